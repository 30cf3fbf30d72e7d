// The feed: the server's state once, then its events. A broken connection is tried again, after longer and longer pauses.

const SILENCE_MS = 5000; // events come four times a second; after this long without one the connection counts as broken
const FIRST_PAUSE_MS = 500;
const LONGEST_PAUSE_MS = 15000;

export class Feed {
  #source = null;
  #timer = 0;
  #attempts = 0;
  #numStages = 0;
  #request = null;
  #on;

  /** `on` has state(state), event(event) and status("connecting" | "live" | "lost", pauseMs). */
  constructor(on) {
    this.#on = on;
  }

  async start() {
    if (!this.#attempts) this.#on.status("connecting"); // later it stays "lost" until it is live
    try {
      const answer = await fetch("/dashboard/state", { cache: "no-store", signal: AbortSignal.timeout(SILENCE_MS) });
      if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
      const state = await answer.json();
      this.#numStages = state.stages.length;
      this.#on.state(state);
    } catch {
      this.#lost();
      return;
    }
    this.#listen();
  }

  /** Ask for the tree of this request from now on; null: of the newest running one. */
  follow(request) {
    if (request === this.#request) return;
    this.#request = request;
    if (this.#source) this.#listen();
  }

  #listen() {
    this.#source?.close();
    const which = this.#request ? `?request=${encodeURIComponent(this.#request)}` : "";
    this.#source = new EventSource(`/dashboard/events${which}`);
    this.#source.onerror = () => this.#lost();
    this.#source.onmessage = (message) => {
      this.#attempts = 0;
      this.#expect();
      this.#on.status("live");
      const event = JSON.parse(message.data);
      if (event.stages.length === this.#numStages) {
        this.#on.event(event);
      } else { // a device's layers have gone to the others
        this.#source.close();
        this.start();
      }
    };
    this.#expect();
  }

  #expect() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#lost(), SILENCE_MS);
  }

  #lost() {
    this.#source?.close();
    this.#source = null;
    clearTimeout(this.#timer);
    const pause = Math.min(LONGEST_PAUSE_MS, FIRST_PAUSE_MS * 2 ** this.#attempts) * (0.75 + Math.random() / 2);
    this.#attempts += 1;
    this.#on.status("lost", pause);
    this.#timer = setTimeout(() => this.start(), pause);
  }
}
