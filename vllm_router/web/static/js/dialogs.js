// The two windows over the page: may this be done, and everything about one server.

import { attributeOf, byId, make, textOf } from "./dom.js";
import { NONE, count, moment, percent, rate, seconds } from "./format.js";
import { t } from "./i18n.js";
import { keyHeaders } from "./key.js";

/** Ask before a server is drained or taken back, then do it. `done(text)` says what was done. */
export class Confirm {
  constructor(done) {
    this.done = done;
    this.dialog = byId("confirm");
    byId("confirm-yes").addEventListener("click", (event) => {
      event.preventDefault();
      this.act();
    });
  }

  ask(server, action) {
    this.server = server.name;
    this.action = action;
    const values = { server: server.name, n: count(server.leases) };
    byId("confirm-title").textContent = t(`${action}Title`, values);
    byId("confirm-text").textContent = t(`${action}Text`, values);
    byId("confirm-yes").textContent = t(action);
    byId("confirm-error").hidden = true;
    byId("confirm-yes").disabled = false;
    this.dialog.showModal();
    // What does nothing has the focus: Enter alone takes no server out.
    byId("confirm-no").focus();
  }

  async act() {
    byId("confirm-yes").disabled = true;
    const problem = await this.post();
    byId("confirm-yes").disabled = false;
    if (problem === null) {
      this.dialog.close();
      this.done(t(`${this.action}Done`, { server: this.server }));
      return;
    }
    byId("confirm-error").textContent = t("actionFailed", { reason: problem });
    byId("confirm-error").hidden = false;
  }

  /** null, or why not. */
  async post() {
    const path = `admin/servers/${encodeURIComponent(this.server)}/${this.action}`;
    try {
      const answer = await fetch(path, { method: "POST", headers: keyHeaders(), signal: AbortSignal.timeout(8000) });
      if (answer.ok) return null;
      const page = await answer.json().catch(() => null);
      return page?.error?.message ?? String(answer.status);
    } catch {
      return t("unreachable");
    }
  }
}

const three = (percentiles) =>
  (percentiles ? [percentiles.p50, percentiles.p95, percentiles.p99].map(seconds).join(", ") : NONE);

const DETAILS = [
  ["detailUrl", (server) => server.url],
  ["detailState", (server) => t(`state_${server.state}`)],
  ["detailReason", (server) => server.reason || NONE],
  ["detailSince", (server) => moment(server.since)],
  ["detailModels", (server) => (server.models ? server.models.join("\n") : t("noModels"))],
  ["detailLoad", (server) => `${percent(server.load)}: ${t("loadText", { running: count(server.running) })}, ${t("loadWaiting", { waiting: count(server.waiting) })}`],
  ["detailCapacity", (server) => count(server.capacity)],
  ["detailLeases", (server) => count(server.leases)],
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

export class Details {
  constructor() {
    this.dialog = byId("details");
    this.title = textOf(byId("details-title"));
    this.rows = DETAILS.map(([key, read]) => {
      const term = make("dt");
      const value = make("dd");
      byId("details-list").append(make("div", {}, term, value));
      return { key, read, term: textOf(term), value: textOf(value) };
    });
    this.state = attributeOf(this.dialog, "data-state");
    // A click beside the window closes it.
    this.dialog.addEventListener("click", (event) => {
      if (event.target === this.dialog) this.dialog.close();
    });
  }

  open(server) {
    this.name = server.name;
    this.show([server]);
    this.dialog.showModal();
  }

  show(servers) {
    const server = servers.find(({ name }) => name === this.name);
    if (server === undefined) return;
    this.title(server.name);
    this.state(server.state);
    for (const { key, read, term, value } of this.rows) {
      term(t(key));
      value(read(server));
    }
  }
}
