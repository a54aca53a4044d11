// Time series over the last minutes.

import { byId, make, store, stored } from "./dom.js";
import { clock, count, rate, seconds } from "./format.js";
import { t } from "./i18n.js";
import { colours } from "./spark.js";

const RANGES = [5, 15, 30, 60];
const HEIGHT = 168;
const LABEL_EVERY = 10;

const CHARTS = [
  {
    id: "work", title: "chartWork",
    series: [
      { figure: "running", label: "seriesRunning", colour: "running", area: "runningArea", format: count },
      { figure: "waiting", label: "seriesWaiting", colour: "waiting", format: count },
      { figure: "capacity", label: "seriesCapacity", colour: "capacity", dash: [4, 4], format: count },
    ],
    axis: count, least: 4,
  },
  {
    id: "rates", title: "chartRates",
    series: [
      { figure: "requests_per_s", label: "seriesRequests", colour: "good", area: "runningArea", format: rate },
      { figure: "errors_per_s", label: "seriesErrors", colour: "bad", format: rate },
    ],
    axis: rate, least: 1,
  },
  {
    id: "latency", title: "chartLatency",
    series: [
      { figure: "ttft_p95", label: "seriesTtft", colour: "running", format: seconds },
      { figure: "duration_p95", label: "seriesDuration", colour: "second", format: seconds, scale: "right" },
    ],
    axis: seconds, right: seconds, least: 0.1,
  },
];

class Chart {
  constructor(spec, parent) {
    this.spec = spec;
    this.title = make("h3");
    this.legend = make("p", { class: "legend" });
    this.values = spec.series.map((series) => {
      const name = make("span", { class: "name" });
      const value = make("b");
      this.legend.append(make("span", { class: `key key-${series.colour}` }, name, value));
      return { name, value };
    });
    this.plotBox = make("div", { class: "plot", role: "img" });
    parent.append(make("div", { class: "panel chart", "data-chart": spec.id },
      make("div", { class: "chart-head" }, this.title, this.legend), this.plotBox));
    this.columns = null;
    this.index = null;
    this.draws = 0;
  }

  build() {
    this.plot?.destroy();
    const { spec } = this;
    const ink = colours();
    const fromZero = (least) => (_, __, greatest) => [0, Math.max(least, (greatest ?? 0) * 1.12)];
    const axis = (scale, format, side) => ({
      scale, side, stroke: ink.ink, font: `11px ${ink.font}`, gap: 4, space: 34,
      size: 46, grid: { show: side === 3, stroke: ink.grid, width: 1 }, ticks: { show: false },
      values: (_, splits) => splits.map((value) => (value === null ? "" : format(value))),
    });
    const axes = [
      {
        stroke: ink.ink, font: `11px ${ink.font}`, size: 24, gap: 4, space: 46,
        grid: { show: false }, ticks: { show: false },
        values: (_, splits, __, ___, step) => splits.map((time) => clock(time, step < 60)),
      },
      axis("y", spec.axis, 3),
    ];
    if (spec.right) axes.push(axis("right", spec.right, 1));
    this.plot = new uPlot({
      width: this.plotBox.clientWidth || 300,
      height: HEIGHT,
      legend: { show: false },
      padding: [8, spec.right ? 0 : 12, 0, 0],
      cursor: {
        y: false, drag: { setScale: false, x: false, y: false },
        sync: { key: "vllm-router", setSeries: false }, points: { size: 6 },
      },
      scales: {
        x: { time: true, range: () => [this.start ?? 0, this.end ?? 1] },
        y: { range: fromZero(spec.least) },
        right: { range: fromZero(spec.least) },
      },
      axes,
      series: [{}, ...spec.series.map((series) => ({
        scale: series.scale ?? "y", stroke: ink[series.colour], width: 1.5, dash: series.dash,
        fill: series.area && ink[series.area], points: { show: false }, spanGaps: false,
      }))],
      hooks: {
        setCursor: [(plot) => {
          this.index = plot.cursor.idx ?? null;
          this.label();
        }],
      },
    }, this.columns ?? [[], ...spec.series.map(() => [])], this.plotBox);
  }

  words() {
    this.title.textContent = t(this.spec.title);
    this.spec.series.forEach((series, index) => {
      this.values[index].name.textContent = t(series.label);
    });
    this.label();
  }

  show(history, minutes) {
    const { columns, start, end } = history.columns(
      minutes * 60, this.spec.series.map((series) => series.figure),
    );
    Object.assign(this, { columns, start, end, minutes });
    if (this.plot) this.plot.setData(columns);
    else this.build();
    this.label();
    // Nobody reads a summary anew every second.
    if (this.draws % LABEL_EVERY === 0) this.describe();
    this.draws += 1;
  }

  /** The legend's figures: those under the cursor, else the newest. */
  label() {
    if (!this.columns) return;
    const at = this.index ?? this.columns[0].length - 1;
    this.spec.series.forEach((series, index) => {
      const value = this.columns[index + 1][at];
      this.values[index].value.textContent =
        value === null || value === undefined ? "–" : series.format(value);
    });
  }

  describe() {
    const values = this.spec.series
      .map((series, index) => `${t(series.label)} ${this.values[index].value.textContent}`);
    this.plotBox.setAttribute("aria-label", t("chartLabel", {
      title: t(this.spec.title), n: this.minutes, values: values.join(", "),
    }));
  }

  resize() {
    const width = this.plotBox.clientWidth;
    if (this.plot && width > 0 && width !== this.plot.width) {
      this.plot.setSize({ width, height: HEIGHT });
    }
  }
}

export class Charts {
  constructor(history) {
    this.history = history;
    const kept = Number(stored("minutes"));
    this.minutes = RANGES.includes(kept) ? kept : RANGES[0];
    this.charts = CHARTS.map((spec) => new Chart(spec, byId("charts")));
    this.buttons = RANGES.map((minutes) => {
      const button = make("button", { type: "button" });
      button.addEventListener("click", () => this.choose(minutes));
      byId("ranges").append(button);
      return button;
    });
    // Drawn after the layout, so that its own change of size starts no further round.
    new ResizeObserver(() => requestAnimationFrame(() => {
      for (const chart of this.charts) chart.resize();
    })).observe(byId("charts"));
    addEventListener("themechange", () => {
      for (const chart of this.charts) if (chart.plot) chart.build();
    });
    this.words();
  }

  words() {
    RANGES.forEach((minutes, index) => {
      this.buttons[index].textContent = t("minutes", { n: minutes });
      this.buttons[index].setAttribute("aria-pressed", String(minutes === this.minutes));
    });
    for (const chart of this.charts) {
      chart.words();
      if (chart.plot) {
        chart.build();
        chart.describe();
      }
    }
  }

  choose(minutes) {
    this.minutes = minutes;
    store("minutes", minutes);
    this.words();
    this.draw();
    for (const chart of this.charts) chart.describe();
  }

  draw() {
    for (const chart of this.charts) chart.show(this.history, this.minutes);
  }
}
