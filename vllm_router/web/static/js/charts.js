// Time series over the last minutes.

import { fromAddress, toAddress } from "./address.js";
import { byId, make, store, stored } from "./dom.js";
import { axisCount, axisSeconds, clock, count, latency, rate } from "./format.js";
import { t } from "./i18n.js";
import { makePlot } from "./plot.js";

const RANGES = [5, 15, 30, 60];
const HEIGHT = 120;
const LABEL_EVERY = 10;
/** The shortest stretch that is shown, in seconds. */
const LEAST_ZOOM = 10;

const percentiles = (figure) => [
  { figure: `${figure}_p50`, label: "seriesP50", colour: "running", area: "runningArea", format: latency },
  { figure: `${figure}_p95`, label: "seriesP95", colour: "second", format: latency },
  { figure: `${figure}_p99`, label: "seriesP99", colour: "waiting", dash: [3, 3], format: latency },
];

const CHARTS = [
  {
    id: "work", title: "chartWork",
    series: [
      { figure: "running", label: "seriesRunning", colour: "running", area: "runningArea", format: count },
      { figure: "waiting", label: "seriesWaiting", colour: "waiting", format: count },
      { figure: "queued", label: "seriesQueued", colour: "second", format: count },
      { figure: "capacity", label: "seriesCapacity", colour: "capacity", dash: [4, 4], loose: true, format: count },
    ],
    axis: axisCount, least: 4,
  },
  {
    id: "rates", title: "chartRates",
    series: [
      { figure: "requests_per_s", label: "seriesRequests", colour: "good", area: "runningArea", format: rate },
      { figure: "errors_per_s", label: "seriesErrors", colour: "bad", format: rate },
      { figure: "refused_per_s", label: "seriesRefused", colour: "waiting", format: rate },
      { figure: "saved_per_s", label: "seriesSaved", colour: "info", format: rate },
      { figure: "tokens_per_s", label: "seriesTokens", colour: "second", dash: [4, 3], format: rate, scale: "right" },
    ],
    axis: axisCount, right: axisCount, least: 1,
  },
  { id: "ttft", title: "chartTtft", series: percentiles("ttft"), axis: axisSeconds, least: 0.1 },
  { id: "duration", title: "chartDuration", series: percentiles("duration"), axis: axisSeconds, least: 0.1 },
];

class Chart {
  constructor(spec, parent, charts) {
    this.spec = spec;
    this.charts = charts;
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
    this.plot = makePlot(this.spec, this.plotBox, {
      columns: this.columns ?? [[], ...this.spec.series.map(() => [])],
      range: () => [this.start ?? 0, this.end ?? 1],
      height: HEIGHT,
      onTime: (index, time) => {
        this.index = index;
        this.charts.showTime(time);
        this.label();
      },
      onZoom: (from, to) => this.charts.zoom(from, to),
    });
  }

  words() {
    this.title.textContent = t(this.spec.title);
    this.spec.series.forEach((series, index) => {
      this.values[index].name.textContent = t(series.label);
    });
    this.label();
  }

  show(history, minutes, zoomed) {
    const { columns, start, end } = history.columns(
      minutes * 60, this.spec.series.map((series) => series.figure),
    );
    // No server: a gap instead of a fall to zero, which would be a line across the whole chart.
    this.spec.series.forEach(({ loose }, index) => {
      if (loose) columns[index + 1] = columns[index + 1].map((value) => value || null);
    });
    Object.assign(this, { columns, minutes, start: zoomed?.from ?? start, end: zoomed?.to ?? end });
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
    const wanted = Number(fromAddress("range") ?? stored("minutes"));
    this.minutes = RANGES.includes(wanted) ? wanted : RANGES[0];
    this.zoomed = null;
    this.time = byId("cursor-time");
    this.charts = CHARTS.map((spec) => new Chart(spec, byId("charts"), this));
    this.buttons = RANGES.map((minutes) => {
      const button = make("button", { type: "button" });
      button.addEventListener("click", () => this.choose(minutes));
      byId("ranges").append(button);
      return button;
    });
    byId("unzoom").addEventListener("click", () => this.zoom(null, null));
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
    toAddress("range", minutes);
    this.zoom(null, null);
    this.words();
    for (const chart of this.charts) chart.describe();
  }

  /** The time under the cursor of any chart. */
  showTime(time) {
    this.time.textContent = time ? clock(time) : "";
  }

  /** Show only what lies between two times; null for the whole range. */
  zoom(from, to) {
    this.zoomed = from !== null && to - from >= LEAST_ZOOM ? { from, to } : null;
    byId("unzoom").hidden = this.zoomed === null;
    this.draw();
  }

  draw() {
    for (const chart of this.charts) chart.show(this.history, this.minutes, this.zoomed);
  }
}
