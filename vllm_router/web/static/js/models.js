// The models: how many of their servers are available, their load and speed. One row per model.

import { fromAddress, toAddress } from "./address.js";
import { appendCells, attributeOf, byId, make, shownIf, textOf } from "./dom.js";
import { NONE, clock, count, latency, percent, rate } from "./format.js";
import { t } from "./i18n.js";
import { LoadBar } from "./load.js";

const COLUMNS = [
  { id: "model", title: "colModel" },
  { id: "servers", title: "colServersUp" },
  { id: "load", title: "colLoad" },
  { id: "requests", title: "colRequests", figure: true },
  { id: "tokens", title: "colTokens", figure: true },
  { id: "ttft50", title: "colTtft50", figure: true },
  { id: "ttft95", title: "colTtft", figure: true },
  { id: "errors", title: "colErrorShare", figure: true },
  { id: "refused", title: "colRefused", figure: true },
  { id: "queued", title: "colQueued", figure: true },
  { id: "budget", title: "colBudget", figure: true },
];

/** What is wrong with a model: `out` (no server), `fallback`, `part` (some servers), or nothing. */
export function health(model) {
  if (model.available === 0) {
    if (model.fallback) return "fallback";
    return model.servers > 0 && model.draining === model.servers ? "drained" : "out";
  }
  return model.available + model.draining < model.servers ? "part" : "good";
}

class Row {
  constructor(name, onChoose) {
    this.name = make("button", { type: "button", class: "model-name", "aria-pressed": "false" }, name);
    this.aliases = make("span", { class: "url" });
    this.servers = make("span", { class: "servers-up" });
    this.note = make("span", { class: "reason" });
    this.bar = new LoadBar();
    this.root = make("tr", { role: "row" });
    const contents = {
      model: [this.name, this.aliases], servers: [this.servers, this.note], load: this.bar.parts,
      requests: [], tokens: [], ttft50: [], ttft95: [], errors: [], refused: [], queued: [], budget: [],
    };
    this.set = {};
    const cells = appendCells(this.root, COLUMNS, { header: "model", prefix: "m", contents, set: this.set });
    Object.assign(this.set, {
      budgetMood: attributeOf(cells.budget, "data-mood"),
      budgetTitle: attributeOf(cells.budget, "title"),
      errorsMood: attributeOf(cells.errors, "data-mood"),
      health: attributeOf(this.root, "data-health"),
      pressed: attributeOf(this.name, "aria-pressed"),
      title: attributeOf(this.name, "title"),
      aliases: textOf(this.aliases),
      aliasesTitle: attributeOf(this.aliases, "title"),
      servers: textOf(this.servers),
      note: textOf(this.note),
      noteTitle: attributeOf(this.note, "title"),
      noteShown: shownIf(this.note),
    });
    this.name.addEventListener("click", () => onChoose(name));
  }

  show(model, chosen) {
    const { set } = this;
    set.health(health(model));
    set.pressed(String(chosen));
    set.title(t("filterModel", { model: model.name }));
    const others = model.names.length - model.adapters;
    const parts = [];
    if (model.aliases.length > 0) parts.push(t("aliases", { names: model.aliases.join(", ") }));
    if (others > 0) parts.push(t("alsoNamed", { names: model.names.slice(0, others).join(", ") }));
    if (model.adapters > 0) parts.push(t("adapters", { n: model.adapters }));
    set.aliases(parts.join(" · "));
    set.aliasesTitle([...model.aliases, ...model.names].join("\n") || null);
    set.servers(`${count(model.available)} / ${count(model.servers)}`);
    const note = this.noteOf(model);
    set.note(note);
    set.noteTitle(note || null);
    set.noteShown(note !== "");
    this.bar.show({
      running: model.running, waiting: model.waiting, capacity: model.capacity, load: model.load,
    });
    set.requests(rate(model.requests_per_s));
    set.tokens(rate(model.tokens_per_s));
    set.ttft50(model.ttft ? latency(model.ttft.p50) : NONE);
    set.ttft95(model.ttft ? latency(model.ttft.p95) : NONE);
    const all = Math.max(model.requests_per_s, model.errors_per_s);
    set.errors(all > 0 ? percent(model.errors_per_s / all) : NONE);
    set.errorsMood(model.errors_per_s > 0 ? "bad" : null);
    set.refused(rate(model.refused_per_s));
    set.queued(count(model.queued));
    const spent = model.budget_left !== null && model.budget_left < 0;
    set.budget(spent ? t("budgetSpent") : percent(model.budget_left));
    set.budgetTitle(spent ? percent(model.budget_left) : null);
    set.budgetMood(spent ? "bad" : null);
  }

  noteOf(model) {
    const since = model.without_server_since ? clock(model.without_server_since, false) : null;
    if (model.available === 0 && model.fallback) {
      return since ? t("fallbackSince", { model: model.fallback, since }) : t("fallbackNow", { model: model.fallback });
    }
    if (model.available === 0) {
      if (model.servers > 0 && model.draining === model.servers) return t("allDraining");
      return since ? t("noServerSince", { since }) : t("noServerYet");
    }
    const away = model.servers - model.available - model.draining;
    return [
      ...(away > 0 ? [t("someAway", { n: count(away) })] : []),
      ...(model.draining > 0 ? [t("someDraining", { n: count(model.draining) })] : []),
    ].join(t("listComma"));
  }

  words() {
    for (const column of COLUMNS) this.set[`${column.id}Label`](t(column.title));
  }
}

export class Models {
  /** `onChoose(name)` is called with the model whose servers are to be shown, null for all. */
  constructor(onChoose) {
    this.onChoose = onChoose;
    this.rows = new Map();
    this.chosen = null;
    this.wanted = fromAddress("model");
    this.models = [];
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map((column) => {
      const title = make("span");
      row.append(make("th", {
        scope: "col", role: "columnheader", class: `m-${column.id}${column.figure ? " figure" : ""}`,
      }, title));
      return { column, title };
    });
    document.querySelector("#models-table thead").append(row);
    this.body = document.querySelector("#models-table tbody");
    this.words();
  }

  choose(name) {
    this.chosen = this.chosen === name ? null : name;
    toAddress("model", this.chosen);
    this.show(this.models);
    this.onChoose(this.chosen);
  }

  words() {
    for (const { column, title } of this.titles) title.textContent = t(column.title);
    for (const row of this.rows.values()) row.words();
    this.show(this.models);
  }

  show(models) {
    this.models = models;
    // Models without a server first, then in the order of the alphabet.
    const order = [...models].sort((one, other) => trouble(other) - trouble(one));
    const gone = new Set(this.rows.keys());
    let place = this.body.firstElementChild;
    for (const model of order) {
      gone.delete(model.name);
      let row = this.rows.get(model.name);
      if (row === undefined) {
        row = new Row(model.name, (name) => this.choose(name));
        row.words();
        this.rows.set(model.name, row);
      }
      row.show(model, this.chosen === model.name);
      if (row.root === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.root, place);
    }
    for (const name of gone) {
      this.rows.get(name).root.remove();
      this.rows.delete(name);
    }
    byId("models-section").hidden = models.length === 0;
    // Without objectives the column would be empty.
    byId("models-table").toggleAttribute("data-no-budget", models.every((model) => model.budget_left === null));
    if (this.wanted && models.some(({ name }) => name === this.wanted)) {
      const { wanted } = this;
      this.wanted = null;
      this.choose(wanted);
    }
  }
}

const trouble = (model) => ({ out: 3, fallback: 2, part: 1 }[health(model)] ?? 0);
