// Small line charts without axes, drawn on a canvas.

import { memo } from "./dom.js";

let palette = null;
addEventListener("themechange", () => { palette = null; });

/** The theme's colours, which a canvas cannot take from the style sheet by itself. */
export function colours() {
  if (palette === null) {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(`--${name}`).trim();
    palette = {
      line: of("spark"), area: of("spark-area"), running: of("running"), waiting: of("waiting"),
      capacity: of("muted"), good: of("running"), bad: of("bad"), second: of("second"), info: of("info"),
      grid: of("grid"), ink: of("muted"), runningArea: of("running-area"),
      font: style.fontFamily,
    };
  }
  return palette;
}

/** At most `points` values: the greatest of each stretch, so that no peak is lost. */
function thinned(values, points) {
  if (values.length <= points) return values;
  const out = [];
  for (let index = 0; index < points; index += 1) {
    const from = Math.floor((index * values.length) / points);
    const to = Math.floor(((index + 1) * values.length) / points);
    let greatest = null;
    for (let at = from; at < to; at += 1) {
      if (values[at] !== null && (greatest === null || values[at] > greatest)) greatest = values[at];
    }
    out.push(greatest);
  }
  return out;
}

/** A sparkline over `length` values whose newest is at the right edge. */
export class Spark {
  constructor(canvas, { length = 300, ceiling = 0, area = true } = {}) {
    this.canvas = canvas;
    this.length = length;
    this.ceiling = ceiling;
    this.area = area;
    this.resize = memo((size) => {
      const [width, height] = size.split("x");
      canvas.width = width;
      canvas.height = height;
    });
  }

  draw(values) {
    const { canvas } = this;
    const ratio = devicePixelRatio || 1;
    const width = Math.round((this.width ??= canvas.clientWidth) * ratio);
    const height = Math.round((this.height ??= canvas.clientHeight) * ratio);
    if (width === 0 || height === 0) {
      this.width = this.height = undefined;
      return;
    }
    this.resize(`${width}x${height}`);
    const points = Math.min(this.length, Math.round(width / ratio / 2));
    const shown = thinned(values, Math.max(1, Math.round((values.length / this.length) * points)));
    const pen = canvas.getContext("2d");
    pen.clearRect(0, 0, width, height);
    // Without a ceiling, a constant figure is drawn below the top, not as a full block.
    const top = Math.max(this.ceiling * 1.05, Math.max(...shown, 1e-9) * (this.ceiling ? 1.05 : 1.4));
    const step = width / Math.max(1, points - 1);
    const start = width - (shown.length - 1) * step;
    const y = (value) => height - ratio - (value / top) * (height - 2 * ratio);
    const { line, area } = colours();
    pen.lineWidth = 1.25 * ratio;
    pen.lineJoin = "round";
    pen.strokeStyle = line;
    pen.fillStyle = area;
    let from = null;
    const close = (last) => {
      if (from === null) return;
      pen.stroke();
      if (this.area) {
        pen.lineTo(start + last * step, height);
        pen.lineTo(start + from * step, height);
        pen.fill();
      }
      from = null;
    };
    shown.forEach((value, index) => {
      if (value === null) {
        close(index - 1);
      } else if (from === null) {
        from = index;
        pen.beginPath();
        pen.moveTo(start + index * step, y(value));
      } else {
        pen.lineTo(start + index * step, y(value));
      }
    });
    close(shown.length - 1);
  }

  /** After the layout has changed. */
  remeasure() {
    this.width = this.height = undefined;
  }
}
