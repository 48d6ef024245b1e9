// The last figures, for sparklines, and the highest ones seen.
import { KEYS } from "./figures.js";

export const LENGTH = 120;

export class History {
  constructor() {
    this.series = Object.fromEntries(KEYS.map((key) => [key, []]));
    this.peaks = Object.fromEntries(KEYS.map((key) => [key, null]));
  }

  add(figures) {
    for (const key of KEYS) {
      const value = figures[key].percent;
      const values = this.series[key];
      values.push(value);
      if (values.length > LENGTH) values.shift();
      if (value !== null) this.peaks[key] = Math.max(this.peaks[key] ?? 0, value);
    }
  }

  resetPeaks() {
    for (const key of KEYS) this.peaks[key] = this.series[key].at(-1) ?? null;
  }
}
