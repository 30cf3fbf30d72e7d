// The draft tree of one request: left to right by depth, siblings by probability, the first child level with its parent.

import { brief, byId, element, setAttribute, setText } from "./dom.js";

const ROW = 23;
const HEIGHT = 18;
const GAP = 20; // between columns
const MARGIN = 10;
const LONGEST_LABEL = 12;
const FAINTEST = 0.62; // still readable
const STATES = { accepted: "accepted", in_flight: "in flight", drafted: "drafted", pruned: "pruned" };
const NAMESPACE = "http://www.w3.org/2000/svg";

const pen = document.createElement("canvas").getContext("2d");
pen.font = "11.5px ui-monospace, monospace";

export class Tree {
  #svg = byId("tree");
  #edges = svg("g");
  #nodes = svg("g");
  #shown = new Map(); // node id -> its elements, kept from one event to the next so that they move
  #request = null;

  constructor() {
    this.#svg.append(this.#edges, this.#nodes);
    byId("tree-legend").append(...Object.keys(STATES).map(legend));
    this.#caption("", "The tree of a running request grows here.");
  }

  /** `tree` may be null: then the request's last tree stays, faded. */
  show(tree, request) {
    if (!tree) {
      this.#svg.classList.add("over");
      if (request && request !== this.#request) this.#clear(`${brief(request)} has no tree now.`);
      return;
    }
    if (tree.request !== this.#request) this.#clear("");
    this.#request = tree.request;
    this.#svg.classList.remove("over");
    const { placed, width, height } = layOut(tree.nodes);
    for (const [id, { node, edge }] of this.#shown) {
      if (placed.has(id)) continue;
      node.remove();
      edge.remove();
      this.#shown.delete(id);
    }
    for (const place of placed.values()) this.#draw(place, placed.get(place.node.parent));
    setAttribute(this.#svg, "width", width);
    setAttribute(this.#svg, "height", height);
    setAttribute(this.#svg, "data-nodes", placed.size);
    const counts = Object.keys(STATES).map((state) => `${tree.nodes.filter((node) => node.state === state).length} ${STATES[state]}`);
    this.#caption(`${brief(tree.request)}: ${counts.join(", ")}`, "");
  }

  #clear(note) {
    this.#shown.clear();
    this.#edges.replaceChildren();
    this.#nodes.replaceChildren();
    this.#request = null;
    for (const name of ["width", "height", "data-nodes"]) setAttribute(this.#svg, name, 0);
    this.#caption("", note);
  }

  #caption(caption, note) {
    setText(byId("tree-caption"), caption);
    setText(byId("no-tree"), note);
    setAttribute(this.#svg, "aria-label", `Draft tree. ${caption || note}`);
  }

  #draw(place, parent) {
    const { node, label, width, x, y } = place;
    const shown = this.#shown.get(node.id) ?? this.#add(node.id);
    const certain = node.state === "accepted" || node.state === "pruned";
    const faint = certain ? 1 : FAINTEST + (1 - FAINTEST) * Math.sqrt(node.probability ?? 1);
    setAttribute(shown.node, "class", `node ${node.state}`);
    setAttribute(shown.edge, "class", `edge ${node.state}`);
    shown.node.style.transform = `translate(${x}px, ${y}px)`;
    shown.node.style.opacity = shown.edge.style.opacity = faint.toFixed(2);
    setAttribute(shown.shape, "d", outline(node.state, width));
    setText(shown.text, label);
    setAttribute(shown.text, "x", width / 2);
    setText(shown.title, `${JSON.stringify(node.token)}, ${STATES[node.state]}, probability ${(node.probability ?? 0).toPrecision(2)}`);
    setAttribute(shown.edge, "d", parent ? curve(parent.x + parent.width, parent.y, x, y) : "M0,0");
  }

  #add(id) {
    const [shape, text, title] = [svg("path"), svg("text", { y: 4 }), svg("title")];
    const shown = { node: svg("g"), edge: svg("path"), shape, text, title };
    shown.node.append(title, shape, text);
    this.#nodes.append(shown.node);
    this.#edges.append(shown.edge);
    this.#shown.set(id, shown);
    return shown;
  }
}

/**
 * Where each node goes, by id. Parents come first in `nodes`. A node shares its row with its first child, and so with the
 * whole chain of first children; each other child takes the first row that is free for its own chain. No edges cross.
 */
function layOut(nodes) {
  const placed = new Map();
  const roots = [];
  const columns = [];
  for (const node of nodes) {
    const parent = placed.get(node.parent);
    const label = visible(node.token);
    const place = { node, label, depth: parent ? parent.depth + 1 : 0, width: pen.measureText(label).width + 16, children: [] };
    columns[place.depth] = Math.max(columns[place.depth] ?? 0, place.width);
    (parent?.children ?? roots).push(place);
    placed.set(node.id, place);
  }
  const starts = [MARGIN];
  columns.forEach((width, depth) => starts.push(starts[depth] + width + GAP));

  const free = columns.map(() => 0); // the first free row of each column
  const settle = (place, row) => {
    place.x = starts[place.depth];
    place.y = MARGIN + HEIGHT / 2 + row * ROW;
    free[place.depth] = row + 1;
    place.children.forEach((child, i) => settle(child, i ? firstFree(child) : row));
  };
  const firstFree = (place) => Math.max(free[place.depth], place.children.length ? firstFree(place.children[0]) : 0);
  for (const { children } of placed.values()) children.sort(byRank);
  roots.sort(byRank).forEach((root) => settle(root, firstFree(root)));
  return { placed, width: starts.at(-1) - GAP + MARGIN, height: MARGIN * 2 + Math.max(...free, 1) * ROW - (ROW - HEIGHT) };
}

/** The accepted one first, pruned ones last, else the most probable first. */
function byRank(a, b) {
  const rank = ({ node }) => (node.state === "accepted" ? 2 : node.state === "pruned" ? -2 : 0) + (node.probability ?? 0);
  return rank(b) - rank(a);
}

/** Each state has a shape of its own: a pill, an arrow on its way, a box, a box with its corners cut. */
function outline(state, width) {
  const h = HEIGHT / 2;
  const w = width;
  switch (state) {
    case "accepted":
      return `M${h},${-h}H${w - h}A${h},${h} 0 0 1 ${w - h},${h}H${h}A${h},${h} 0 0 1 ${h},${-h}Z`;
    case "in_flight":
      return `M0,${-h}H${w - 7}L${w},0L${w - 7},${h}H0Z`;
    case "pruned":
      return `M5,${-h}H${w - 5}L${w},${5 - h}V${h - 5}L${w - 5},${h}H5L0,${h - 5}V${5 - h}Z`;
    default:
      return `M0,${-h}H${w}V${h}H0Z`;
  }
}

function curve(x1, y1, x2, y2) {
  const middle = x2 - GAP / 2;
  return `M${x1},${y1}L${x2 - GAP},${y1}C${middle},${y1} ${middle},${y2} ${x2},${y2}`;
}

/** A token with its white space made visible, cut where it is long. */
function visible(token) {
  const shown = token.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(/\p{C}/gu, "\u{FFFD}");
  const letters = [...shown];
  return letters.length > LONGEST_LABEL ? `${letters.slice(0, LONGEST_LABEL - 1).join("")}…` : shown || "∅";
}

function legend(state) {
  const shape = svg("path", { d: outline(state, 28), transform: "translate(1, 11)" });
  const group = svg("g", { class: `node ${state}` });
  const picture = svg("svg", { width: 30, height: 22, "aria-hidden": "true" });
  group.append(shape);
  picture.append(group);
  return element("li", {}, picture, STATES[state]);
}

function svg(tag, attributes = {}) {
  const node = document.createElementNS(NAMESPACE, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
