// The pipeline over time: a lane for the driver and one for each stage, a bar for each piece of work.
// Lanes are canvases, drawn a little behind the server's clock, so that bars are known before they slide into view.

import { Brush, describe } from "./bars.js";
import { byId, element, setAttribute, setText } from "./dom.js";

const LONGEST_S = 30;
const LAG_S = 0.4;
const LANE_HEIGHT = 34;
const GRID_S = { 2: 0.5, 5: 1, 10: 2, 30: 5 };
const HINT = "Point at a bar, or focus a lane and use the arrow keys.";

const still = matchMedia("(prefers-reduced-motion: reduce)");

export class Timeline {
  #lanes = [];
  #window = 5;
  #last = null; // the newest time on the server's clock
  #offset = 0; // from the page's clock to the server's
  #pausedAt = null;
  #picked = null; // the bar that is described
  #pointer = null; // {lane, x} while a pointer is over a lane
  #drawn = NaN; // the right edge that was drawn last
  #dirty = true;
  #brush = new Brush(() => this.#redraw());
  #detail = byId("bar-detail");
  #resized = new ResizeObserver(() => this.#redraw());

  constructor() {
    byId("window").addEventListener("change", (event) => this.#setWindow(Number(event.target.value)));
    byId("pause").addEventListener("click", (event) => {
      this.#pausedAt = this.#pausedAt === null ? this.#edge() : null;
      event.target.setAttribute("aria-pressed", this.#pausedAt !== null);
      event.target.textContent = this.#pausedAt === null ? "Pause" : "Resume";
      this.#redraw();
    });
    this.#setWindow(Number(document.querySelector("#window :checked").value));
    setText(this.#detail, HINT);
    const tick = () => {
      this.#frame();
      requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
  }

  setServer(state) {
    if (this.#lanes.length === state.stages.length + 1) return;
    this.#resized.disconnect();
    const names = ["Driver", ...state.stages.map((stage) => `Stage ${stage.stage}`)];
    this.#lanes = names.map((name, place) => this.#makeLane(name, place));
    byId("lanes").replaceChildren(
      ...this.#lanes.flatMap((lane) => [element("span", { "aria-hidden": "true" }, lane.name), lane.node]),
    );
    this.#lanes.forEach((lane) => this.#resized.observe(lane.node));
  }

  addEvent(event) {
    if (this.#last !== null && event.now_s < this.#last - 1) this.#forget(); // the server has begun anew
    const offset = event.now_s - performance.now() / 1000;
    this.#offset = this.#last === null ? offset : this.#offset + (offset - this.#offset) / 8;
    if (Math.abs(offset - this.#offset) > 1) this.#offset = offset;
    this.#last = event.now_s;
    for (const span of event.spans) this.#add(span);
    const oldest = event.now_s - LONGEST_S - 1;
    const held = this.#pausedAt ?? Infinity;
    for (const lane of this.#lanes) {
      for (const [key, span] of lane.spans) {
        const inView = span.start_s < held && span.end_s > held - LONGEST_S;
        if (span.end_s < oldest && !inView) lane.spans.delete(key);
      }
    }
    this.#dirty = true;
  }

  /** After a reconnect the server may send a span again: it is known by when and where it began. */
  #add(span) {
    this.#lanes[span.place]?.spans.set(`${span.start_s} ${span.work} ${span.segment} ${span.request}`, span);
  }

  #forget() {
    this.#last = this.#picked = null;
    this.#drawn = NaN;
    if (this.#pausedAt !== null) byId("pause").click();
    for (const lane of this.#lanes) lane.spans.clear();
  }

  #setWindow(seconds) {
    this.#window = seconds;
    setText(byId("axis-start"), `−${seconds} s`);
    setText(byId("axis-middle"), `−${seconds / 2} s`);
    this.#redraw();
  }

  #redraw() {
    this.#dirty = true;
  }

  /** The time at the right edge; it stops soon after the feed does. */
  #edge() {
    if (this.#pausedAt !== null) return this.#pausedAt;
    if (this.#last === null) return 0;
    const now = still.matches ? this.#last : Math.min(performance.now() / 1000 + this.#offset, this.#last + 1);
    return Math.max(now - LAG_S, this.#drawn || 0);
  }

  #frame() {
    const edge = this.#edge();
    const width = this.#lanes[0]?.node.clientWidth ?? 0;
    const moved = Math.abs(edge - this.#drawn) * (width / this.#window) * devicePixelRatio >= 0.5;
    if (!width || !(moved || this.#dirty)) return;
    this.#dirty = false;
    this.#drawn = edge;
    this.#pick(edge, width);
    for (const lane of this.#lanes) this.#draw(lane, edge, width);
  }

  #draw(lane, edge, width) {
    const { canvas, context: pen } = lane;
    const ratio = devicePixelRatio;
    if (canvas.width !== Math.round(width * ratio) || canvas.height !== LANE_HEIGHT * ratio) {
      canvas.width = Math.round(width * ratio);
      canvas.height = LANE_HEIGHT * ratio;
    }
    // The origin moves with the bars, and so do the stripes; it stays near the edge, where floats are exact.
    const scale = width / this.#window;
    const origin = Math.floor(edge);
    pen.setTransform(ratio, 0, 0, ratio, (width - (edge - origin) * scale) * ratio, 0);
    const left = (edge - this.#window - origin) * scale;
    pen.clearRect(left - 1, 0, width + 2, LANE_HEIGHT);

    pen.fillStyle = this.#brush.colour("line");
    const step = GRID_S[this.#window];
    for (let s = Math.ceil((edge - this.#window) / step) * step; s < edge; s += step) {
      pen.fillRect((s - origin) * scale, 0, 1, LANE_HEIGHT);
    }

    let bars = 0;
    let before = null; // requests that share a forward stand on each other
    let below = 0;
    for (const span of lane.spans.values()) {
      if (!this.#inView(span, edge)) continue;
      bars += 1;
      below = span.shared && span.start_s === before?.start_s ? below + before.rows : 0;
      before = span;
      const x = (span.start_s - origin) * scale;
      const length = (span.end_s - span.start_s) * scale;
      const bar = Math.max(length - (length > 4 ? 1 : 0), 1); // a hair of air between long bars
      this.#brush.bar(pen, span, x, bar, LANE_HEIGHT, below);
      if (this.#related(span)) {
        pen.strokeStyle = this.#brush.colour("ink");
        pen.lineWidth = span === this.#picked ? 2 : 1;
        pen.strokeRect(x, 1, Math.max(bar, 3), LANE_HEIGHT - 2);
      }
    }
    setAttribute(lane.node, "data-bars", bars);
  }

  #inView(span, edge) {
    return span.end_s > edge - this.#window && span.start_s < edge;
  }

  /** The picked bar itself, and its segment's bars in the other lanes. */
  #related(span) {
    const picked = this.#picked;
    if (!picked) return false;
    return span === picked || (picked.segment >= 0 && span.segment === picked.segment && span.request === picked.request);
  }

  // What is under the pointer or chosen by key.

  #makeLane(name, place) {
    const canvas = element("canvas");
    const node = element(
      "div",
      {
        className: "lane",
        "data-testid": `lane-${place}`,
        "data-bars": 0,
        role: "slider", // arrow keys go through its bars
        tabIndex: place === 0 ? 0 : -1, // one tab stop for all lanes
        "aria-label": `${name}, bars`,
        "aria-valuenow": 0,
        "aria-valuetext": "No bar chosen",
        "aria-describedby": "timeline-title",
      },
      canvas,
    );
    const lane = { name, place, node, canvas, context: canvas.getContext("2d"), spans: new Map() };
    const point = (event) => {
      this.#pointer = { lane, x: event.clientX - node.getBoundingClientRect().left };
      this.#redraw();
    };
    node.addEventListener("pointermove", point);
    node.addEventListener("pointerdown", point);
    node.addEventListener("pointerleave", () => {
      this.#pointer = null;
      this.#choose(null);
    });
    node.addEventListener("blur", () => this.#choose(null));
    node.addEventListener("keydown", (event) => this.#onKey(event, lane));
    return lane;
  }

  #pick(edge, width) {
    if (this.#picked && !this.#inView(this.#picked, edge)) this.#choose(null);
    if (!this.#pointer) return;
    const { lane, x } = this.#pointer;
    const time = edge - (1 - x / width) * this.#window;
    const near = (3 * this.#window) / width; // three pixels
    let best = null;
    let distance = near;
    for (const span of lane.spans.values()) {
      const away = Math.max(span.start_s - time, time - span.end_s, 0);
      if (away < distance || (away === 0 && distance === 0)) [best, distance] = [span, away];
    }
    this.#choose(best);
  }

  #choose(span) {
    if (span === this.#picked) return;
    this.#picked = span;
    const lane = span && this.#lanes[span.place];
    setText(this.#detail, span ? `${lane.name}: ${describe(span)}` : HINT);
    for (const { node } of this.#lanes) {
      setAttribute(node, "aria-valuetext", node === lane?.node ? describe(span) : "No bar chosen");
    }
    this.#redraw();
  }

  #onKey(event, lane) {
    const { key } = event;
    if (key === "ArrowUp" || key === "ArrowDown") this.#toLane(this.#lanes[lane.place + (key === "ArrowUp" ? -1 : 1)]);
    else if (["ArrowLeft", "ArrowRight", "Home", "End"].includes(key)) this.#alongLane(lane, key);
    else return;
    event.preventDefault();
  }

  /** To the next lane: to the same segment there, else to what happened at the same time. */
  #toLane(lane) {
    if (!lane) return;
    const from = this.#picked;
    this.#lanes.forEach((other) => (other.node.tabIndex = other === lane ? 0 : -1));
    lane.node.focus();
    if (!from) return;
    const bars = this.#bars(lane);
    const away = (span) => Math.abs(span.start_s - from.start_s);
    const same = bars.find((span) => from.segment >= 0 && span.segment === from.segment && span.request === from.request);
    this.#choose(same ?? bars.reduce((best, span) => (!best || away(span) < away(best) ? span : best), null));
  }

  #alongLane(lane, key) {
    const bars = this.#bars(lane);
    if (!bars.length) return;
    const at = bars.indexOf(this.#picked);
    const newest = bars.length - 1;
    const step = key === "ArrowLeft" ? -1 : 1;
    const index = key === "Home" ? 0 : key === "End" || at < 0 ? newest : Math.min(Math.max(at + step, 0), newest);
    setAttribute(lane.node, "aria-valuemax", newest);
    setAttribute(lane.node, "aria-valuenow", index);
    this.#choose(bars[index]);
  }

  #bars(lane) {
    const edge = this.#edge();
    return [...lane.spans.values()].filter((span) => this.#inView(span, edge)).sort((a, b) => a.start_s - b.start_s);
  }
}
