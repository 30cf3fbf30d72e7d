// The table of requests; choosing one shows its tree.

import { byId, decimal, element, keep, setAttribute, setText } from "./dom.js";

export class Requests {
  #rows = new Map();
  #onChoose;

  constructor(onChoose) {
    this.#onChoose = onChoose;
  }

  update(requests, selected) {
    const rows = requests.map((request) => this.#rows.get(request.id) ?? this.#make(request.id));
    this.#rows = new Map(requests.map((request, i) => [request.id, rows[i]]));
    rows.forEach((row, i) => row.update(requests[i], requests[i].id === selected));
    keep(byId("requests"), rows.map((row) => row.node));
    byId("no-requests").hidden = rows.length > 0;
  }

  #make(id) {
    const button = element("button", { type: "button", className: "quiet", title: `Show the tree of ${id}` }, id);
    const state = element("span", { className: "state" });
    const [tokens, speed, accepted] = [element("td"), element("td"), element("td")];
    const node = element("tr", {}, element("th", { scope: "row" }, button), element("td", {}, state), tokens, speed, accepted);
    node.addEventListener("click", () => this.#onChoose(id));
    return {
      node,
      update(request, selected) {
        setAttribute(button, "aria-pressed", selected);
        setText(state, request.state);
        setAttribute(state, "data-state", request.state);
        setText(tokens, String(request.tokens));
        setText(speed, decimal(request.tokens_per_s));
        setText(accepted, decimal(request.mean_accepted, 2));
      },
    };
  }
}
