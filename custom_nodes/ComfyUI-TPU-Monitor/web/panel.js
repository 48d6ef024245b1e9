// The sidebar tab: figures with peaks and history, every chip, what ComfyUI holds on the TPU.
import { ChipList } from "./chips.js";
import { element, setText, setTitle } from "./dom.js";
import { COLOURS, KEYS } from "./figures.js";
import { clock, gib, percent } from "./format.js";
import { Sparkline } from "./sparkline.js";
import { text } from "./texts.js";

export class Panel {
  /** `onFree()` and `onResetPeaks()` belong to the two buttons. */
  constructor({ onFree, onResetPeaks }) {
    this.heading = element("span", "tpu-monitor-heading", text("title"));
    const free = button(text("freeHbm"), text("freeHbmHint"), onFree);
    free.id = "tpu-monitor-free";
    this.note = element("p", "tpu-monitor-note", text("waiting"));
    this.run = element("p", "tpu-monitor-run");
    this.rows = Object.fromEntries(KEYS.map((key) => [key, figureRow(key)]));
    this.chips = new ChipList();
    this.held = element("ul", "tpu-monitor-held");
    const reset = button(text("resetPeaks"), "", onResetPeaks);
    this.element = element(
      "div",
      "tpu-monitor-panel",
      element("div", "tpu-monitor-head", this.heading, free),
      this.note,
      this.run,
      element("div", "tpu-monitor-figures", ...KEYS.map((key) => this.rows[key].box)),
      element("div", "tpu-monitor-right", reset),
      this.chips.element,
      element("h3", "", text("held")),
      this.held,
    );
    this.element.id = "tpu-monitor-panel";
  }

  get open() {
    return this.element.isConnected;
  }

  say(note) {
    setText(this.note, note);
    this.note.hidden = !note;
  }

  update(sample, figures, history) {
    const count = sample.chips.length;
    setText(this.heading, count ? `${sample.chip_kind ?? "TPU"} × ${count}` : text("title"));
    for (const key of KEYS) {
      const { name, value, detail, peak, sparkline } = this.rows[key];
      setText(name, text(`${key}.long`, figures.diskPath));
      setText(value, percent(figures[key].percent));
      setText(detail, figures[key].detail);
      setTitle(detail, figures[key].detail);
      detail.classList.toggle("tpu-monitor-wrap", figures[key].percent === null);
      setText(peak, history.peaks[key] === null ? "" : text("peak", percent(history.peaks[key])));
      sparkline.draw(history.series[key]);
    }
    this.chips.update(sample);
    this.#updateHeld(Object.entries(sample.held));
  }

  updateRun(run) {
    this.run.hidden = !run.promptId;
    const steps = run.running && run.max ? ` ${Math.round(run.value)}/${Math.round(run.max)}` : "";
    setText(this.run, `${run.running ? run.node || "…" : text(run.outcome ?? "")}${steps} · ${clock(run.seconds)}`);
  }

  #updateHeld(held) {
    const lines = held.length ? held.map(([label, bytes]) => `${label}: ${gib(bytes)} GiB`) : [text("heldNothing")];
    while (this.held.children.length > lines.length) this.held.lastChild.remove();
    while (this.held.children.length < lines.length) this.held.append(element("li"));
    lines.forEach((line, index) => setText(this.held.children[index], line));
  }
}

function button(name, hint, onClick) {
  const made = element("button", "tpu-monitor-button", name);
  made.type = "button";
  if (hint) made.title = hint;
  made.addEventListener("click", onClick);
  return made;
}

function figureRow(key) {
  const name = element("span", "tpu-monitor-name", text(`${key}.long`, ""));
  const value = element("span", "tpu-monitor-big", "–");
  const detail = element("span", "tpu-monitor-detail");
  const peak = element("span", "tpu-monitor-detail tpu-monitor-peak");
  const sparkline = new Sparkline(COLOURS[key]);
  const box = element("div", "tpu-monitor-figure", name, value, sparkline.element, detail, peak);
  box.dataset.figure = key;
  return { box, name, value, detail, peak, sparkline };
}
