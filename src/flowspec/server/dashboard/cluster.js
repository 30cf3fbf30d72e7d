// The cluster as a pipeline of cards: the driver, then each stage.

import { byId, bytes, decimal, element, percent, setAttribute, setText } from "./dom.js";

export class Cluster {
  #driver = null;
  #stages = new Map();

  setServer(state) {
    const cards = state.stages.map((stage) => new StageCard(stage));
    this.#stages = new Map(cards.map((card) => [card.stage, card]));
    this.#driver = new DriverCard(state);
    byId("cluster").replaceChildren(this.#driver.node, ...cards.map((card) => card.node));
  }

  addEvent(event) {
    this.#driver?.update(event);
    for (const stage of event.stages) this.#stages.get(stage.stage)?.update(stage);
  }
}

class DriverCard {
  #busy = element("dd");
  #meter = element("i");
  #draftState = element("dd");
  #draftLink = element("dd");

  constructor(state) {
    const draftWorker = { "Draft worker": this.#draftState, "Over its link": this.#draftLink };
    this.node = element(
      "li",
      { className: "stage driver", "data-testid": "driver" },
      element("h3", {}, "Driver"),
      figures({ Busy: this.#busy }),
      meter(this.#meter),
      figures({ Model: state.model, Schedule: state.schedule, Draft: state.draft }),
      state.draft_worker == null ? "" : figures(draftWorker),
    );
    this.update({});
  }

  update(event) {
    showBusy(this.#busy, this.#meter, event.driver_busy);
    if (event.draft_worker == null) return;
    setText(this.#draftState, event.draft_worker.state);
    setText(this.#draftLink, bytes(event.draft_worker.link_bytes));
  }
}

class StageCard {
  #state = element("span", { className: "state" });
  #busy = element("dd");
  #meter = element("i");
  #link = element("dd");
  #trip = element("dd");

  constructor(stage) {
    this.stage = stage.stage;
    this.node = element(
      "li",
      { className: "stage", "data-testid": `stage-${stage.stage}` },
      element("h3", {}, `Stage ${stage.stage}`, this.#state),
      element("p", { className: "device", title: `${stage.device} at ${stage.address}` }, stage.device),
      figures({ Busy: this.#busy }),
      meter(this.#meter),
      figures({
        Layers: stage.layers,
        Weights: bytes(stage.weight_bytes),
        "Peak memory": bytes(stage.peak_memory_bytes),
        "Over the link": this.#link,
        "Round trip": this.#trip,
      }),
    );
    this.update({ state: stage.state });
  }

  update(stage) {
    setText(this.#state, stage.state);
    setAttribute(this.#state, "data-state", stage.state);
    showBusy(this.#busy, this.#meter, stage.busy);
    setText(this.#link, bytes(stage.link_bytes));
    setText(this.#trip, stage.round_trip_ms == null ? "–" : `${decimal(stage.round_trip_ms)} ms`);
  }
}

function meter(filling) {
  return element("span", { className: "meter", "aria-hidden": "true" }, filling);
}

function showBusy(figure, filling, busy) {
  setText(figure, percent(busy));
  filling.style.width = `${100 * Math.min(busy ?? 0, 1)}%`;
}

function figures(rows) {
  const pairs = Object.entries(rows).map(([name, value]) =>
    element("div", {}, element("dt", {}, name), value instanceof Node ? value : element("dd", {}, value)),
  );
  return element("dl", {}, ...pairs);
}
