// The prompt that runs: which node, how far, since when. Fed by ComfyUI's own events.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const STORED = "TPUMonitor.run";

export class Run extends EventTarget {
  constructor() {
    super();
    this.promptId = null;
    this.running = false;
    this.outcome = null;
    this.node = "";
    this.value = 0;
    this.max = 0;
    this.started = 0;
    this.ended = 0;
  }

  /** Seconds the prompt has run, or ran. */
  get seconds() {
    return ((this.running ? Date.now() : this.ended) - this.started) / 1000;
  }

  /** Progress of the node in percent, or null. */
  get percent() {
    return this.max > 0 ? (100 * this.value) / this.max : null;
  }

  listen() {
    api.addEventListener("execution_start", ({ detail }) => this.#begin(detail.prompt_id, Date.now()));
    api.addEventListener("executing", ({ detail }) => detail && this.#enter(String(detail)));
    api.addEventListener("progress_state", ({ detail }) => this.#progressState(detail));
    api.addEventListener("execution_success", ({ detail }) => this.#end(detail.prompt_id, "success"));
    api.addEventListener("execution_error", ({ detail }) => this.#end(detail.prompt_id, "error"));
    api.addEventListener("execution_interrupted", ({ detail }) => this.#end(detail.prompt_id, "interrupted"));
  }

  #begin(promptId, started) {
    Object.assign(this, { promptId, started, running: true, outcome: null, node: "", value: 0, max: 0 });
    // The page may be loaded again while the prompt runs.
    sessionStorage.setItem(STORED, JSON.stringify({ promptId, started }));
    this.#changed();
  }

  #resume(promptId) {
    let stored = null;
    try {
      stored = JSON.parse(sessionStorage.getItem(STORED));
    } catch {
      // Not ours, or broken: the time then counts from now.
    }
    this.#begin(promptId, stored?.promptId === promptId ? stored.started : Date.now());
  }

  #enter(nodeId) {
    if (!this.running) return;
    const name = nodeTitle(nodeId);
    if (name === this.node) return;
    Object.assign(this, { node: name, value: 0, max: 0 });
    this.#changed();
  }

  #progressState({ prompt_id: promptId, nodes }) {
    const active = Object.values(nodes).filter((node) => node.state === "running").at(-1);
    if (!active) return;
    if (!this.running || this.promptId !== promptId) this.#resume(promptId);
    this.node = nodeTitle(active.display_node_id ?? active.node_id);
    // Nodes without steps of their own count to 1.
    Object.assign(this, active.max > 1 ? { value: active.value, max: active.max } : { value: 0, max: 0 });
    this.#changed();
  }

  #end(promptId, outcome) {
    if (!this.running || (promptId && promptId !== this.promptId)) return;
    Object.assign(this, { running: false, outcome, ended: Date.now() });
    sessionStorage.removeItem(STORED);
    this.#changed();
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

function nodeTitle(id) {
  const graph = app.rootGraph ?? app.graph;
  // Nodes in subgraphs have ids like 12:3; the outer one is what the user sees.
  const node = graph?.getNodeById?.(Number(String(id).split(":")[0]));
  return node?.title ?? `#${id}`;
}
