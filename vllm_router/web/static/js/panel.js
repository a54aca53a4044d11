// The panel of one server: its state, charts, events, last decisions and every figure.

import { fromAddress, toAddress } from "./address.js";
import { attributeOf, byId, make, shownIf, textOf } from "./dom.js";
import {
  NONE, axisCount, axisSeconds, clock, count, latency, moment, percent, rate, seconds,
} from "./format.js";
import { ended } from "./decisions.js";
import { ask } from "./fetch.js";
import { outcomeText, reasonText } from "./reasons.js";
import { t } from "./i18n.js";
import { makePlot } from "./plot.js";

const CAPACITY = { learnt: "capacityLearnt", assumed: "capacityAssumed" };
const DECISIONS_EVERY = 4000;
const SHOWN_DECISIONS = 12;
const SHOWN_EVENTS = 12;
const HEIGHT = 96;

const three = (percentiles) =>
  (percentiles ? [percentiles.p50, percentiles.p95, percentiles.p99].map(latency).join(", ") : NONE);

const DETAILS = [
  ["detailUrl", (server) => server.url],
  ["detailSince", (server) => moment(server.since)],
  ["detailModels", (server) => (server.models ? server.models.join("\n") : t("noModels"))],
  ["detailLoad", (server) => `${percent(server.load)}: ${t("loadText", { running: count(server.running) })}, ${t("loadWaiting", { waiting: count(server.waiting) })}`],
  ["detailCapacity", (server) => [
    t(CAPACITY[server.capacity_source] ?? "capacityConfigured", { capacity: count(server.capacity) }),
    ...(server.proposed_capacity ? [t("capacityProposed", { capacity: count(server.proposed_capacity) })] : []),
  ].join("\n")],
  ["detailLeases", (server) => (server.max_in_flight
    ? t("detailLeasesOf", { n: count(server.leases), most: count(server.max_in_flight) })
    : count(server.leases)) + (server.elsewhere ? `\n${t("detailElsewhere", { n: count(server.elsewhere) })}` : "")],
  ["detailRequests", (server) => rate(server.requests_per_s)],
  ["detailErrors", (server) => rate(server.errors_per_s)],
  ["detailTokens", (server) => rate(server.tokens_per_s)],
  ["detailChunks", (server) => rate(server.chunks_per_s)],
  ["detailTtft", (server) => three(server.ttft)],
  ["detailDuration", (server) => three(server.duration)],
  ["detailKv", (server) => percent(server.kv_usage)],
  ["detailPrefix", (server) => percent(server.prefix_hit_rate)],
  ["detailExpected", (server) => percent(server.expected_hit_rate)],
  ["detailMetrics", (server) => seconds(server.metrics_age)],
];

const series = (figure, label, format, colour, more = {}) => ({ figure, label, format, colour, ...more });
const CHARTS = [
  { id: "work", title: "chartWorkHere", axis: axisCount, least: 4, series: [
    series("running", "seriesRunning", count, "running", { area: "runningArea" }),
    series("waiting", "seriesWaiting", count, "waiting"),
  ] },
  { id: "ttft", title: "chartTtft", axis: axisSeconds, least: 0.1, series: [
    series("ttft_p95", "seriesP95", latency, "second"),
  ] },
  { id: "rates", title: "chartRates", axis: axisCount, right: axisCount, least: 1, series: [
    series("requests_per_s", "seriesRequests", rate, "running", { area: "runningArea" }),
    series("errors_per_s", "seriesErrors", rate, "bad"),
    series("tokens_per_s", "seriesTokens", rate, "second", { scale: "right", dash: [4, 3] }),
  ] },
  { id: "load", title: "chartLoad", axis: percent, least: 1, series: [
    series("load", "seriesLoad", percent, "running", { area: "runningArea" }),
    series("kv_usage", "seriesKv", percent, "second"),
  ] },
];

class SmallChart {
  constructor(spec, parent) {
    this.spec = spec;
    this.title = make("h3");
    this.legend = make("p", { class: "legend" });
    this.values = spec.series.map((one) => {
      const [name, value] = [make("span"), make("b")];
      this.legend.append(make("span", { class: `key key-${one.colour}` }, name, value));
      return { name: textOf(name), value: textOf(value) };
    });
    this.box = make("div", { class: "plot small", role: "img" });
    parent.append(make("div", { class: "small-chart" }, this.title, this.legend, this.box));
    this.at = null;
  }

  show(columns, end) {
    this.columns = columns;
    this.title.textContent = t(this.spec.title);
    this.box.setAttribute("aria-label", t(this.spec.title));
    this.range = [Math.max(columns[0][0] ?? end - 60, end - 300), end];
    if (this.plot && this.plot.width === this.box.clientWidth) this.plot.setData(columns);
    else {
      this.plot?.destroy();
      this.plot = makePlot(this.spec, this.box, {
        columns, range: () => this.range, height: HEIGHT,
        onTime: (index) => { this.at = index; this.label(); },
      });
    }
    this.label();
  }

  label() {
    const at = this.at ?? this.columns[0].length - 1;
    this.spec.series.forEach((one, index) => {
      const value = this.columns[index + 1][at];
      this.values[index].name(t(one.label));
      this.values[index].value(value === null || value === undefined ? NONE : one.format(value));
    });
  }

  destroy() {
    this.plot?.destroy();
    this.plot = null;
  }
}

export class Panel {
  /** `onAction(server, action)` drains or takes back; `eventsOf(name)` gives list items. */
  constructor(onAction, eventsOf) {
    this.dialog = byId("details");
    this.eventsOf = eventsOf;
    this.title = textOf(byId("details-title"));
    this.chip = textOf(byId("details-chip"));
    this.reason = textOf(byId("details-reason"));
    this.reasonShown = shownIf(byId("details-reason"));
    this.button = byId("details-drain");
    this.action = textOf(this.button);
    this.state = attributeOf(this.dialog, "data-state");
    this.rows = DETAILS.map(([key, read]) => {
      const [term, value] = [make("dt"), make("dd")];
      byId("details-list").append(make("div", {}, term, value));
      return { key, read, term: textOf(term), value: textOf(value) };
    });
    this.charts = CHARTS.map((spec) => new SmallChart(spec, byId("details-charts")));
    this.name = fromAddress("server");
    this.wanted = this.name !== null;
    this.allowed = false;
    this.button.addEventListener("click", () => {
      if (this.server) onAction(this.server, this.server.state === "draining" ? "undrain" : "drain");
    });
    byId("details-close").addEventListener("click", () => this.close());
    addEventListener("keydown", (event) => {
      const other = document.querySelector("dialog[open]:not(#details)");
      if (event.key === "Escape" && this.dialog.open && !other) this.close();
    });
    setInterval(() => this.read(), DECISIONS_EVERY);
  }

  allow(admin) {
    this.allowed = admin;
    this.button.hidden = !admin;
  }

  open(server) {
    this.name = server.name;
    this.before = document.activeElement;
    toAddress("server", server.name);
    byId("details-decisions").replaceChildren();
    if (!this.dialog.open) this.dialog.show();
    this.show([server]);
    byId("details-close").focus();
    this.read();
  }

  close() {
    toAddress("server", null);
    this.dialog.close();
    this.wanted = false;
    for (const chart of this.charts) chart.destroy();
    if (this.before?.isConnected) this.before.focus();
  }

  show(servers, history = this.history, time = this.time) {
    Object.assign(this, { history, time });
    const server = servers.find(({ name }) => name === this.name);
    if (this.wanted && server) {
      this.wanted = false;
      this.open(server);
      return;
    }
    if (!this.dialog.open) return;
    this.button.hidden = !this.allowed || server === undefined;
    if (server === undefined) {
      // Its last figures stay, and must not be taken for its present ones.
      this.state("removed");
      this.chip(t("removed"));
      this.reason(t("removedText"));
      this.reasonShown(true);
      return;
    }
    this.server = server;
    this.title(server.name);
    this.state(server.state);
    this.chip(t(`state_${server.state}`) + (server.leaving ? `, ${t("leaving")}` : ""));
    this.reason(reasonText(server));
    this.reasonShown(server.reason !== "");
    const draining = server.state === "draining";
    this.action(t(draining ? "undrain" : "drain"));
    this.button.setAttribute("aria-label", t(draining ? "undrainLabel" : "drainLabel", { server: server.name }));
    for (const { key, read, term, value } of this.rows) {
      term(t(key));
      value(read(server));
    }
    const events = this.eventsOf(server.name, SHOWN_EVENTS);
    if (events.key !== this.eventsKey) {
      this.eventsKey = events.key;
      byId("details-events").replaceChildren(...events.items);
      byId("details-no-events").hidden = events.items.length > 0;
    }
  }

  draw() {
    if (!this.dialog.open || !this.history || !this.name) return;
    for (const chart of this.charts) {
      const columns = this.history.ofServer(this.name, chart.spec.series.map(({ figure }) => figure));
      chart.show(columns, columns[0].at(-1) ?? this.time ?? 0);
    }
  }

  words() {
    this.eventsKey = null;
    if (this.server) this.show([this.server]);
  }

  /** The last requests on the server, and those that failed. */
  async read() {
    if (!this.dialog.open || document.hidden || !this.name) return;
    const name = this.name;
    const query = `server=${encodeURIComponent(name)}&limit=${SHOWN_DECISIONS}`;
    const found = await ask(`decisions?${query}`);
    const failed = await ask(`decisions?${query}&failed=1`);
    if (name !== this.name || found.problem || failed.problem) return;
    const item = (row) => make("li", { "data-mood": row.failed ? "bad" : "none" },
      make("time", {}, clock(ended(row))),
      make("span", {}, `${row.model ?? NONE} · ${row.status || NONE} ${outcomeText(row.code ?? row.outcome)} · ${seconds(row.duration_seconds)}`));
    const put = (id, rows) => {
      byId(id).replaceChildren(...rows.map(item));
      byId(`${id}-none`).hidden = rows.length > 0;
    };
    put("details-errors", failed.decisions);
    put("details-decisions", found.decisions);
  }
}
