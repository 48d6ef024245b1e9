// The compact row in the top bar.
import { element, setFill, setText, setTitle } from "./dom.js";
import { COLOURS, KEYS } from "./figures.js";
import { clock, percent } from "./format.js";
import { text } from "./texts.js";

export class Strip {
  constructor(onOpen) {
    this.element = element("div", "tpu-monitor-strip");
    this.element.id = "tpu-monitor-strip";
    this.element.setAttribute("role", "button");
    this.element.setAttribute("aria-label", text("title"));
    this.element.tabIndex = 0;
    this.element.addEventListener("click", onOpen);
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Enter" || event.key === " ") {
        event.preventDefault();
        onOpen();
      }
    });
    this.items = Object.fromEntries(KEYS.map((key) => [key, this.#item(key, text(key))]));
    this.run = this.#item("run", "");
    this.run.box.hidden = true;
    this.shown = {};
  }

  #item(key, name) {
    const fill = element("span", "tpu-monitor-fill");
    const label = element("span", "tpu-monitor-label", name);
    const value = element("span", "tpu-monitor-value", "–");
    const box = element("span", "tpu-monitor-item", fill, label, value);
    box.dataset.item = key;
    if (COLOURS[key]) box.style.setProperty("--tpu-monitor-colour", COLOURS[key]);
    this.element.append(box);
    return { box, fill, label, value };
  }

  /** `shown`: key → boolean, also "run"; `width` of an item in pixels. */
  configure(shown, width) {
    this.shown = shown;
    for (const key of KEYS) this.items[key].box.hidden = !shown[key];
    this.element.style.setProperty("--tpu-monitor-width", `${width}px`);
  }

  update(figures) {
    for (const key of KEYS) {
      if (!this.shown[key]) continue;
      const { box, fill, value } = this.items[key];
      const { percent: share, detail, stale } = figures[key];
      setFill(fill, share);
      setText(value, percent(share));
      const now = `${text(`${key}.long`, figures.diskPath)}: ${share === null ? "" : percent(share)}`;
      setTitle(box, `${now} ${detail}\n${text("open")}`);
      box.classList.toggle("tpu-monitor-missing", share === null);
      box.classList.toggle("tpu-monitor-stale", Boolean(stale));
    }
  }

  /** No figures are coming: show none rather than old ones. */
  clear(why) {
    for (const { box, fill, value } of KEYS.map((key) => this.items[key])) {
      setFill(fill, null);
      setText(value, "–");
      setTitle(box, why);
      box.classList.add("tpu-monitor-missing");
    }
  }

  updateRun(run) {
    const { box, fill, label, value } = this.run;
    box.hidden = !this.shown.run || !run.promptId;
    if (box.hidden) return;
    const steps = run.running && run.max ? ` ${Math.round(run.value)}/${Math.round(run.max)}` : "";
    setText(label, run.running ? run.node || "…" : text(run.outcome));
    setText(value, `${steps} ${clock(run.seconds)}`.trim());
    setTitle(box, `${label.textContent}${steps} · ${clock(run.seconds)}`);
    setFill(fill, run.running ? run.percent : 0);
    box.dataset.state = run.running ? "running" : run.outcome;
  }
}
