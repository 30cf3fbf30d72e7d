// The chat box: sends a prompt, shows the text as it comes, and says what it cost.

import { complete } from "./completion.js";
import { byId, element, setText } from "./dom.js";

export class Chat {
  #server = null; // the server's state, once it is known
  #history = []; // messages, for models with a chat template
  #abort = null; // of the request under way
  #onRequest;
  #form = byId("chat-form");
  #prompt = byId("prompt");
  #send = byId("send");
  #stop = byId("stop");
  #conversation = byId("conversation");
  #status = byId("chat-status");

  /** `onRequest(id)` is told the id of each request as soon as the server has named it. */
  constructor(onRequest) {
    this.#onRequest = onRequest;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.#prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || !(event.ctrlKey || event.metaKey)) return;
      event.preventDefault();
      this.#form.requestSubmit();
    });
    this.#prompt.addEventListener("input", () => this.#update());
    this.#stop.addEventListener("click", () => this.#abort?.abort());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.#abort?.abort();
    });
    byId("clear").addEventListener("click", () => {
      this.#abort?.abort();
      this.#history = [];
      this.#conversation.replaceChildren();
      this.#prompt.focus();
    });
    this.#update();
  }

  setServer(state) {
    this.#server = state;
    const chat = state.has_chat_template;
    const note = byId("chat-note");
    setText(byId("chat-title"), chat ? "Chat" : "Continue a text");
    setText(note, chat ? "" : "This model has no chat template: it just continues your text.");
    note.hidden = chat;
    this.#prompt.placeholder = chat ? "Say something" : "Begin a text, for example: def main(";
    const limit = byId("max-tokens");
    limit.max = state.max_positions;
    limit.value = Math.min(limit.value, state.max_positions);
    this.#update();
  }

  #update() {
    const running = this.#abort !== null;
    const focus = document.activeElement;
    this.#send.disabled = running || !this.#server || !this.#prompt.value;
    this.#stop.disabled = !running;
    if (focus === this.#send && running) this.#stop.focus();
    if (focus === this.#stop && !running) this.#prompt.focus();
    if (!running && !this.#status.textContent) setText(this.#status, "Ctrl or ⌘ + Enter sends, Escape stops.");
  }

  async #submit() {
    const prompt = this.#prompt.value;
    if (this.#abort || !this.#server || !prompt) return;
    this.#abort = new AbortController();
    this.#prompt.value = "";
    setText(this.#status, "Writing…");
    this.#update();

    const chat = this.#server.has_chat_template;
    const turn = new Turn(prompt, chat);
    this.#conversation.append(turn.node);
    this.#toEnd(true);
    const messages = [...this.#history, { role: "user", content: prompt }];
    const started = performance.now();
    let first = 0;
    let request = null;
    let usage = null;
    let outcome = "";
    try {
      const chunks = complete(
        chat ? "/v1/chat/completions" : "/v1/completions",
        {
          model: this.#server.model,
          ...(chat ? { messages } : { prompt }),
          temperature: byId("temperature").valueAsNumber,
          max_tokens: byId("max-tokens").valueAsNumber,
        },
        this.#abort.signal,
      );
      for await (const chunk of chunks) {
        if (chunk.id && chunk.id !== request) this.#onRequest((request = chunk.id));
        usage = chunk.usage ?? usage;
        if (!chunk.text) continue;
        first ||= performance.now();
        const atEnd = this.#atEnd();
        turn.add(chunk.text);
        this.#toEnd(atEnd);
      }
    } catch (error) {
      if (this.#abort.signal.aborted) outcome = "Stopped";
      else turn.fail(error instanceof TypeError ? `The server cannot be reached (${error.message}).` : error.message);
    }
    const atEnd = this.#atEnd();
    const figures = [outcome, ...describe(usage, started, first, performance.now())].filter(Boolean).join(" · ");
    turn.finish(figures);
    this.#toEnd(atEnd);
    if (chat && turn.text && turn.node.isConnected) this.#history = [...messages, { role: "assistant", content: turn.text }];
    if (turn.error && !turn.text && !this.#prompt.value) this.#prompt.value = prompt; // to be mended and sent again
    setText(this.#status, turn.error ? `Error: ${turn.error}` : `${outcome || "Finished"}.`);
    this.#abort = null;
    this.#update();
  }

  #atEnd() {
    const box = this.#conversation;
    return box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  }

  /** Keep the newest text in sight, unless the reader has scrolled away from it. */
  #toEnd(wanted) {
    if (wanted) this.#conversation.scrollTop = this.#conversation.scrollHeight;
  }
}

/** A prompt and what the model made of it. */
class Turn {
  error = "";
  #answer = element("span", { className: "answer" });
  #foot = element("p", { className: "foot muted" });

  constructor(prompt, chat) {
    this.node = element("article", { className: chat ? "turn" : "turn plain", "aria-busy": "true" });
    const said = element("span", { className: "prompt" }, prompt);
    if (chat) this.node.append(element("h3", {}, "You"), said, element("h3", {}, "Model"), this.#answer);
    else this.node.append(said, this.#answer);
  }

  get text() {
    return this.#answer.textContent;
  }

  add(text) {
    this.#answer.append(text);
  }

  fail(message) {
    this.error = message;
    this.node.append(element("p", { className: "error" }, `Error: ${message}`));
  }

  finish(figures) {
    this.#answer.normalize();
    this.node.removeAttribute("aria-busy");
    setText(this.#foot, figures);
    if (figures) this.node.append(this.#foot);
  }
}

function describe(usage, started, first, ended) {
  const seconds = (ended - started) / 1000;
  const tokens = usage?.completion_tokens;
  return [
    tokens == null ? "" : `${tokens} tokens in ${seconds.toFixed(1)}\u00a0s`,
    tokens == null ? "" : `${(tokens / seconds).toFixed(1)} tokens/s`,
    first ? `first token after ${((first - started) / 1000).toFixed(2)}\u00a0s` : "",
  ];
}
