// A short history as a line on a canvas.
import { element } from "./dom.js";
import { LENGTH } from "./history.js";

const HEIGHT = 26;

export class Sparkline {
  constructor(colour) {
    this.colour = colour;
    this.values = [];
    this.width = 0;
    this.element = element("canvas", "tpu-monitor-sparkline");
    // Knowing the width beforehand keeps drawing from forcing a layout.
    new ResizeObserver(([entry]) => this.#resize(entry.contentRect.width)).observe(this.element);
  }

  /** `values`: percents, null where there was none; at most LENGTH, newest last. */
  draw(values) {
    this.values = values;
    if (!this.width) return;
    const pen = this.element.getContext("2d");
    pen.setTransform(this.scale, 0, 0, this.scale, 0, 0);
    pen.clearRect(0, 0, this.width, HEIGHT);
    pen.strokeStyle = this.colour;
    pen.lineWidth = 1.5;
    pen.lineJoin = "round";
    pen.beginPath();
    const step = this.width / (LENGTH - 1);
    const first = LENGTH - values.length;
    let drawing = false;
    values.forEach((value, index) => {
      if (value !== null) {
        const [x, y] = [(first + index) * step, 1 + (HEIGHT - 2) * (1 - value / 100)];
        if (drawing) pen.lineTo(x, y);
        else pen.moveTo(x, y);
      }
      drawing = value !== null;
    });
    pen.stroke();
  }

  #resize(width) {
    if (!width || width === this.width) return;
    this.width = width;
    this.scale = window.devicePixelRatio || 1;
    this.element.width = Math.round(width * this.scale);
    this.element.height = HEIGHT * this.scale;
    this.draw(this.values);
  }
}
