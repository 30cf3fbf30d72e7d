// The dashboard. Each module has one idea:
//   feed.js        the server's events, connected again when they break
//   completion.js  one streamed completion of the API
//   chat.js        the chat box
//   timeline.js    the pipeline over time, on canvas
//   bars.js        how one of its bars looks
//   tree.js        the draft tree of one request, in SVG
//   cluster.js     the cards of driver and stages
//   requests.js    the table of requests
//   dom.js         elements, texts and figures
// This one wires them together, fills the header, and knows which request is selected.

import { Chat } from "./chat.js";
import { Cluster } from "./cluster.js";
import { byId, decimal, percent, setText } from "./dom.js";
import { Feed } from "./feed.js";
import { Requests } from "./requests.js";
import { Timeline } from "./timeline.js";
import { Tree } from "./tree.js";

// Whose tree is shown: `selected`, or the newest running request while that is null.
let selected = null;
let byHand = false; // a request that was chosen by hand stays; the page's own gives way when it has ended

const timeline = new Timeline();
const tree = new Tree();
const cluster = new Cluster();
const requests = new Requests((id) => select(id === selected ? null : id, true));
const chat = new Chat((id) => select(id, false));
const feed = new Feed({ state: showState, event: showEvent, status: showStatus });

byId("follow").addEventListener("click", () => select(null, false));
feed.start();

function select(id, hand) {
  selected = id;
  byHand = hand && id !== null;
  byId("follow").setAttribute("aria-pressed", !byHand);
  feed.follow(id);
}

function showState(state) {
  document.title = `${state.model} · flowspec`;
  setText(byId("about"), `${state.model} · schedule ${state.schedule} · draft ${state.draft} · version ${state.version}`);
  for (const part of [chat, timeline, cluster]) part.setServer(state);
}

function showEvent(event) {
  setText(byId("tokens-per-s"), decimal(event.tokens_per_s));
  setText(byId("mean-accepted"), decimal(event.mean_accepted, 2));
  setText(byId("load"), `${event.running} / ${event.waiting}`);
  setText(byId("kv-usage"), percent(event.kv_usage));
  showFailure(event.failure, event.problem);
  letGo(event.requests);
  timeline.addEvent(event);
  cluster.addEvent(event);
  requests.update(event.requests, selected ?? event.tree?.request);
  tree.show(event.tree, selected);
}

/** When the page's own request has ended and another one runs, follow that. */
function letGo(all) {
  const ended = all.find((request) => request.id === selected && !["waiting", "running"].includes(request.state));
  if (!byHand && ended && all.some((request) => request.state === "running")) select(null, false);
}

function showFailure(failure, problem) {
  const box = byId("failure");
  setText(box, failure ? `Failure: ${failure}` : (problem ?? ""));
  box.hidden = !failure && !problem;
}

function showStatus(status, pauseMs) {
  const text = {
    connecting: "Connecting…",
    live: "Live",
    lost: `Connection lost, next try in ${Math.ceil(pauseMs / 1000)} s`,
  }[status];
  document.documentElement.dataset.feed = status;
  setText(byId("connection"), text);
}
