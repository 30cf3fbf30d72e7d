// How one bar looks, and how it is told in words. The colours are those of the style sheet.

import { brief, decimal, element } from "./dom.js";

// How high a bar of the driver's work is, so that kinds do not differ by colour alone.
const HEIGHTS = {
  "draft pass": 1,
  "merging draft pass": 0.85,
  growing: 0.78,
  lm_head: 0.7,
  verify: 0.55,
  hint: 0.4,
  send: 0.25,
};
const FATES = ["accepted", "wasted", "pruned"];

export class Brush {
  #colours = new Map();

  /** `onChange` is called when the page turns dark or light. */
  constructor(onChange) {
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.#colours.clear();
      onChange();
    });
  }

  /** `below`: rows of the same forward that stand below. */
  bar(pen, span, x, width, laneHeight, below) {
    const full = laneHeight - 4;
    if (span.work !== "forward") {
      const height = full * (HEIGHTS[span.work] ?? 0.5);
      pen.fillStyle = this.colour(span.work.replaceAll(/[ _]/g, "-"));
      pen.fillRect(x, 2 + full - height, width, height);
      return;
    }
    const row = full / Math.max(span.shared ?? 0, span.rows, 1);
    let bottom = 2 + full - below * row;
    if (span.prefill) {
      pen.fillStyle = this.colour("prefill");
      pen.fillRect(x, bottom - span.rows * row, width, span.rows * row);
      return;
    }
    for (const fate of FATES) {
      const height = span[fate] * row;
      pen.fillStyle = fate === "pruned" ? this.#stripes(pen) : this.colour(fate);
      pen.fillRect(x, bottom - height, width, height);
      bottom -= height;
    }
  }

  colour(name) {
    if (!this.#colours.has(name)) {
      const style = getComputedStyle(document.documentElement);
      this.#colours.set(name, style.getPropertyValue(`--${name}`) || style.getPropertyValue("--muted"));
    }
    return this.#colours.get(name);
  }

  #stripes(pen) {
    if (!this.#colours.has("stripes")) {
      const tile = element("canvas", { width: 4, height: 4 });
      const brush = tile.getContext("2d");
      brush.strokeStyle = this.colour("pruned");
      brush.lineWidth = 1.3;
      for (const shift of [-4, 0, 4]) {
        brush.moveTo(shift - 1, 5);
        brush.lineTo(shift + 5, -1);
      }
      brush.stroke();
      this.#colours.set("stripes", pen.createPattern(tile, "repeat"));
    }
    return this.#colours.get("stripes");
  }
}

export function describe(span) {
  const parts = [span.prefill ? "prefill" : span.work, `${decimal((span.end_s - span.start_s) * 1000)} ms`];
  if (span.segment >= 0) parts.push(`segment ${span.segment}`);
  if (span.rows) {
    const fates = FATES.map((fate) => `${span[fate]} ${fate}`).join(", ");
    parts.push(`${span.rows}${span.shared > span.rows ? ` of ${span.shared}` : ""} rows${span.work === "forward" && !span.prefill ? `: ${fates}` : ""}`);
  }
  if (span.request) parts.push(brief(span.request));
  return parts.join(" · ");
}
