// Asks the server for samples while somebody can see them.
import { api } from "../../scripts/api.js";

const EVENT = "tpu_monitor.sample";
const CHECK_MS = 3000;

export class Feed {
  /** `onSample(sample)` for each; `onSilence()` when none come although they should. */
  constructor(onSample, onSilence) {
    this.rate = 0;
    this.agreed = null;
    this.last = 0;
    this.onSilence = onSilence;
    api.addEventListener(EVENT, ({ detail }) => {
      if (document.hidden || !this.rate) return;
      this.last = performance.now();
      onSample(detail);
    });
    document.addEventListener("visibilitychange", () => this.#ask());
    api.addEventListener("reconnected", () => this.#ask());
    // The first message of a connection is a status; it brings the page's id.
    api.addEventListener("status", () => this.agreed === null && this.#ask());
    setInterval(() => this.#check(), CHECK_MS);
  }

  /** Seconds between samples; 0: none. */
  setRate(rate) {
    this.rate = rate;
    this.#ask();
  }

  get #wanted() {
    return document.hidden ? 0 : this.rate;
  }

  async #ask() {
    const rate = this.#wanted;
    if (!api.clientId) return;
    this.last = performance.now();
    try {
      const response = await api.fetchApi("/tpu-monitor/listen", {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify({ client_id: api.clientId, rate }),
      });
      this.agreed = response.ok ? rate : null;
    } catch {
      this.agreed = null;
    }
  }

  #check() {
    const rate = this.#wanted;
    const silent = rate > 0 && performance.now() - this.last > 1000 * rate + CHECK_MS;
    if (silent) this.onSilence();
    if (silent || this.agreed !== rate) this.#ask();
  }
}
