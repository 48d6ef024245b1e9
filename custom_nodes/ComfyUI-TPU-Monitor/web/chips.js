// Every chip: bars for a host's worth of them, a heat map for more.
import { element, setFill, setText, setTitle } from "./dom.js";
import { chipPercent, COLOURS } from "./figures.js";
import { gib, percent } from "./format.js";
import { reasonText, text } from "./texts.js";

const KEYS = ["hbm", "duty", "tensorcore"];
const MOST_BARS = 16;

export class ChipList {
  constructor() {
    this.title = element("h3", "", text("chips"));
    this.body = element("div");
    this.element = element("section", "tpu-monitor-chips", this.title, this.body);
    this.parts = [];
    this.shown = null;
    this.key = "hbm";
  }

  update(sample) {
    const { chips } = sample;
    const shown = `${chips.length} ${this.key}`;
    if (shown !== this.shown) {
      this.shown = shown;
      this.parts = chips.length > MOST_BARS ? this.#heatMap(chips) : this.#bars(chips);
    }
    this.parts.forEach((part, position) => part(chips[position]));
    if (!chips.length) setText(this.body, [text("noChips"), reasonText(sample.unavailable.chips)].join(": "));
  }

  /** One function for each chip that shows its figures. */
  #bars(chips) {
    this.body.replaceChildren();
    this.body.className = chips.length ? "tpu-monitor-bars" : "";
    if (!chips.length) return [];
    this.body.append(element("span"), ...KEYS.map((key) => element("span", "tpu-monitor-column", text(key))));
    return chips.map((chip) => {
      const bars = KEYS.map(bar);
      const label = element("span", "tpu-monitor-index", String(chip.index));
      this.body.append(label, ...bars.map(({ box }) => box));
      return (now) => {
        setTitle(label, describe(now));
        KEYS.forEach((key, position) => show(bars[position], now, key));
      };
    });
  }

  #heatMap(chips) {
    const choice = element("div", "tpu-monitor-choice");
    for (const key of KEYS) {
      const pick = element("button", "tpu-monitor-button", text(key));
      pick.type = "button";
      pick.dataset.key = key;
      pick.setAttribute("aria-pressed", String(key === this.key));
      pick.addEventListener("click", () => this.#choose(key));
      choice.append(pick);
    }
    const grid = element("div", "tpu-monitor-heat");
    grid.style.setProperty("--tpu-monitor-colour", COLOURS[this.key]);
    const cells = chips.map(() => {
      const heat = element("span", "tpu-monitor-warmth");
      return { heat, box: element("span", "tpu-monitor-cell", heat) };
    });
    grid.append(...cells.map(({ box }) => box));
    this.body.className = "";
    this.body.replaceChildren(choice, grid);
    return cells.map(({ box, heat }) => (now) => {
      const value = chipPercent(now, this.key);
      const opacity = ((value ?? 0) / 100).toFixed(2);
      if (heat.style.opacity !== opacity) heat.style.opacity = opacity;
      setTitle(box, describe(now));
    });
  }

  #choose(key) {
    this.key = key;
    // The next sample builds the map anew.
    this.shown = null;
  }
}

function bar(key) {
  const fill = element("span", "tpu-monitor-fill");
  const value = element("span", "tpu-monitor-value");
  const box = element("span", "tpu-monitor-bar", fill, value);
  box.style.setProperty("--tpu-monitor-colour", COLOURS[key]);
  return { box, fill, value };
}

function show({ fill, value }, chip, key) {
  const share = chipPercent(chip, key);
  setFill(fill, share);
  const memory = key === "hbm" && share !== null;
  setText(value, memory ? `${gib(chip.hbm_used)} / ${gib(chip.hbm_total)}` : percent(share));
}

function describe(chip) {
  const known = chip.hbm_used !== null && chip.hbm_total !== null;
  const memory = known ? text("ofTotal", gib(chip.hbm_used), gib(chip.hbm_total)) : "–";
  const lines = [text("chip", chip.index), `${text("hbm.long")}: ${memory}`];
  for (const key of ["duty", "tensorcore"]) lines.push(`${text(`${key}.long`)}: ${percent(chipPercent(chip, key))}`);
  return lines.join("\n");
}
