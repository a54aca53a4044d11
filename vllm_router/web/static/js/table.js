// The servers. A row is made once per server and from then on only written to where it changes.

import { fromAddress, toAddress } from "./address.js";
import { appendCells, attributeOf, byId, make, shownIf, store, stored, styleOf, textOf } from "./dom.js";
import { NONE, count, latency, moment, percent, rate, span } from "./format.js";
import { t } from "./i18n.js";
import { LoadBar } from "./load.js";
import { reasonText } from "./reasons.js";
import { Spark } from "./spark.js";

const COLUMNS = [
  { id: "name", title: "colServer", key: (server) => server.name },
  { id: "state", title: "colState", key: (server) => Math.min(BADNESS.indexOf(server.state), FULL) },
  { id: "load", title: "colLoad", key: (server) => -server.load },
  { id: "trend", title: "colTrend" },
  { id: "leases", title: "colLeases", key: (server) => -server.leases - server.elsewhere, figure: true },
  { id: "requests", title: "colRequests", key: (server) => -server.requests_per_s, figure: true },
  { id: "tokens", title: "colTokens", key: (server) => -(server.tokens_per_s ?? -1), figure: true },
  { id: "ttft", title: "colTtft", key: (server) => -(server.ttft?.p95 ?? -1), figure: true },
  { id: "errors", title: "colErrors", key: (server) => -server.errors_per_s, figure: true },
  { id: "kv", title: "colKv", key: (server) => -(server.kv_usage ?? -1), figure: true },
  { id: "models", title: "colModels" },
  { id: "actions", title: "colActions" },
];
const BADNESS = ["down", "ejected", "silent", "asleep", "paused", "unknown", "draining", "refusing", "full", "up"];
/** A server at its limit is full and up again all the time; its row stays where it is. */
const FULL = BADNESS.indexOf("full");
const SORT_EVERY = 2000;
/** Compares names: ten times as fast as `localeCompare`. */
const BY_NAME = new Intl.Collator(undefined, { numeric: true }).compare;
/** From so many rows on, bars jump instead of gliding: a hundred transitions are not cheap. */
const MANY = 30;
/**
 * Rows out of sight that are written with a snapshot, in turn: those of a thousand servers are all
 * of the last ten seconds, and the browser has little to lay out anew.
 */
const UNSEEN_AT_ONCE = 50;
/**
 * From so many rows on, a row out of sight has no cells: the browser would lay out and paint the
 * thirty thousand nodes of a thousand rows. Rows keep their place where all are as high, see app.css.
 */
const BARE_FROM = 100;
const EQUAL_ROWS = matchMedia("(min-width: 901px)");

class Row {
  constructor(name, table) {
    this.table = table;
    this.name = make("button", { type: "button", class: "server-name" }, name);
    this.url = make("span", { class: "url" });
    this.chip = make("span", { class: "chip" });
    this.since = make("span", { class: "since" });
    this.reason = make("span", { class: "reason" });
    this.bar = new LoadBar();
    this.canvas = make("canvas", { class: "spark", "aria-hidden": "true" });
    this.button = make("button", { type: "button", class: "action" });
    const contents = {
      name: [this.name, this.url],
      state: [make("span", { class: "state-line" }, this.chip, this.since), this.reason],
      load: this.bar.parts,
      trend: [this.canvas], leases: [], requests: [], tokens: [], ttft: [], errors: [], kv: [],
      models: [], actions: [this.button],
    };
    this.root = make("tr", { role: "row" });
    this.set = {};
    this.cells = appendCells(this.root, COLUMNS, { header: "name", prefix: "c", contents, set: this.set });
    this.set.state = attributeOf(this.root, "data-state");
    this.set.old = attributeOf(this.root, "data-old");
    this.set.url = textOf(this.url);
    this.set.chip = textOf(this.chip);
    this.set.since = textOf(this.since);
    this.set.sinceTitle = attributeOf(this.since, "title");
    this.set.reason = textOf(this.reason);
    this.set.reasonTitle = attributeOf(this.reason, "title");
    this.set.reasonShown = shownIf(this.reason);
    this.set.loadTitle = attributeOf(this.cells.load, "title");
    this.set.errorsMood = attributeOf(this.cells.errors, "data-mood");
    this.set.action = textOf(this.button);
    this.set.actionLabel = attributeOf(this.button, "aria-label");
    this.set.nameLabel = attributeOf(this.name, "title");
    this.set.shown = shownIf(this.root);
    this.spark = new Spark(this.canvas, { ceiling: 1 });
    this.models = undefined;
    this.visible = false;
    this.name.addEventListener("click", () => table.onDetails(this.server));
    // The whole row, but for its buttons and a selection of text.
    this.root.addEventListener("click", (event) => {
      if (!event.target.closest("button") && !getSelection()?.toString()) table.onDetails(this.server);
    });
    this.button.addEventListener("click", () => {
      table.onAction(this.server, this.server.state === "draining" ? "undrain" : "drain");
    });
  }

  show(server, now) {
    this.server = server;
    this.table.written += 1;
    const { set } = this;
    set.state(server.state);
    set.old(server.stale && (server.state === "up" || server.state === "full") ? "" : null);
    set.url(server.url.replace(/^https?:\/\//, "") === server.name ? "" : server.url);
    set.nameLabel(t("details", { server: server.name }));
    set.chip(t(`state_${server.state}`) + (server.leaving ? `, ${t("leaving")}` : ""));
    set.since(t("since", { span: span(now - server.since) }));
    if (server.since !== this.sinceTime) {
      this.sinceTime = server.since;
      set.sinceTitle(t("sinceTitle", { moment: moment(server.since) }));
    }
    const reason = reasonText(server);
    set.reason(reason);
    set.reasonTitle(reason);
    set.reasonShown(server.reason !== "");
    this.bar.show({ ...server, exact: !server.stale, source: server.capacity_source });
    const figures = {
      running: count(server.running), waiting: count(server.waiting),
      leases: count(server.leases), capacity: count(server.capacity),
    };
    set.loadTitle(server.stale ? t("loadStale") : t("loadTitle", figures));
    set.leases(server.elsewhere ? t("leasesAnd", { n: figures.leases, more: count(server.elsewhere) }) : figures.leases);
    set.requests(rate(server.requests_per_s));
    set.tokens(rate(server.tokens_per_s));
    set.ttft(server.ttft ? latency(server.ttft.p95) : NONE);
    set.errors(rate(server.errors_per_s));
    set.errorsMood(server.errors_per_s > 0 ? "bad" : null);
    set.kv(percent(server.kv_usage));
    this.showModels(server.models);
    if (this.table.admin) {
      const draining = server.state === "draining";
      set.action(t(draining ? "undrain" : "drain"));
      set.actionLabel(t(draining ? "undrainLabel" : "drainLabel", { server: server.name }));
    }
  }

  fill() {
    if (!this.root.hasChildNodes()) this.root.append(...Object.values(this.cells));
  }

  empty() {
    if (!this.root.contains(document.activeElement)) this.root.replaceChildren();
  }

  showModels(models) {
    const key = models === null ? null : models.join("\n");
    if (key === this.models) return;
    this.models = key;
    const cell = this.cells.models;
    if (models === null) {
      cell.replaceChildren(make("span", { class: "quiet" }, t("noModels")));
      return;
    }
    // Two lines: two models, or one and how many more.
    const [first, ...rest] = models.map((model) => make("span", { class: "model", title: model }, ...named(model)));
    if (rest.length > 1) {
      const more = make("span", { class: "more", title: models.slice(1).join("\n") },
        t("moreModels", { n: rest.length }));
      cell.replaceChildren(first, make("br"), more);
    } else {
      cell.replaceChildren(...(first ? [first] : []), ...rest);
    }
  }

  words() {
    for (const column of COLUMNS) this.set[`${column.id}Label`](t(column.title));
    this.models = this.sinceTime = undefined;
  }

  matches(search, state, model) {
    const { name, url, models } = this.server;
    if (model !== null && !model.some((one) => models?.includes(one))) return false;
    if (state !== null && this.server.state !== state) return false;
    return search === "" || [name, url, ...(models ?? [])]
      .some((text) => text.toLowerCase().includes(search));
  }
}

/** A model's name; the organization before it is left out where there is little room. */
function named(model) {
  const slash = model.lastIndexOf("/") + 1;
  return slash > 0 ? [make("span", { class: "organization" }, model.slice(0, slash)), model.slice(slash)] : [model];
}

export class Table {
  constructor(onAction, onDetails) {
    this.onAction = onAction;
    this.onDetails = onDetails;
    this.admin = false;
    this.rows = new Map();
    this.servers = [];
    this.body = document.querySelector("#fleet tbody");
    this.sort = fromAddress("sort") ?? stored("sort");
    this.filter = fromAddress("state");
    this.model = null;
    this.search = (fromAddress("q") ?? "").toLowerCase();
    byId("search").value = this.search;
    this.sorted = 0;
    this.turn = 0;
    this.written = 0;
    this.chips = new Map();
    this.headers();
    // Sparklines out of sight are not drawn, and rows not written at once.
    this.watcher = new IntersectionObserver((entries) => {
      const bare = this.rows.size >= BARE_FROM && EQUAL_ROWS.matches;
      for (const { target, isIntersecting } of entries) {
        const row = this.byRoot.get(target);
        if (row === undefined) continue;
        row.visible = isIntersecting;
        if (isIntersecting) {
          row.fill();
          row.show(row.server, this.snapshot.time);
        } else if (bare) {
          row.empty();
        }
      }
      this.draw();
    }, { rootMargin: "300px" });
    EQUAL_ROWS.addEventListener("change", () => {
      if (!EQUAL_ROWS.matches) for (const row of this.rows.values()) row.fill();
    });
    this.byRoot = new WeakMap();
    // Where the table is drawn as cards, there are no headers to click on.
    this.choice = byId("sort");
    this.choice.append(...COLUMNS.filter(({ key }) => key).map(({ id }) => make("option", { value: id })));
    this.choice.prepend(make("option", { value: "" }));
    this.choice.addEventListener("change", () => this.sortBy(this.choice.value));
    byId("search").addEventListener("input", () => {
      this.search = byId("search").value.trim().toLowerCase();
      toAddress("q", this.search);
      this.select();
    });
    addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("input, select, textarea, dialog");
      if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
        // The field of the view that is shown; without one the key is the browser's.
        const field = [byId("search"), byId("decisions-search")].find((one) => one.offsetParent !== null);
        if (!field) return;
        event.preventDefault();
        field.focus();
      }
    });
    this.words();
  }

  headers() {
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map((column) => {
      const cell = make("th", {
        scope: "col", role: "columnheader", class: `c-${column.id}${column.figure ? " figure" : ""}`,
      });
      const title = column.key ? make("button", { type: "button" }) : make("span");
      if (column.key) {
        title.addEventListener("click", () => {
          // Again on the same column: back to the order of the configuration.
          this.sortBy(this.orderedBy() === column.id ? "" : column.id);
        });
      }
      cell.append(title);
      row.append(cell);
      return { column, cell, title };
    });
    document.querySelector("#fleet thead").append(row);
  }

  sortBy(column) {
    this.sort = column;
    store("sort", column);
    toAddress("sort", column);
    this.order(true);
  }

  words() {
    for (const option of this.choice.options) {
      const column = COLUMNS.find(({ id }) => id === option.value);
      option.textContent = t(column?.title ?? "sortOrder");
    }
    for (const { column, title } of this.titles) {
      title.textContent = t(column.title);
      if (column.key) title.title = t("sortBy", { column: t(column.title) });
    }
    for (const row of this.rows.values()) row.words();
    if (this.snapshot) this.show(this.snapshot, true);
  }

  allow(admin) {
    this.admin = admin;
    // Names the buttons before the column is shown: the next snapshot comes later.
    if (this.snapshot) this.show(this.snapshot, true);
    byId("fleet").toggleAttribute("data-admin", admin);
  }

  /** Write the rows that can be seen, and some of the others; `all` of them after other changes. */
  show(snapshot, all = false) {
    this.snapshot = snapshot;
    this.servers = snapshot.servers;
    const gone = new Set(this.rows.keys());
    let changed = false;
    let unseen = 0;
    for (const server of snapshot.servers) {
      gone.delete(server.name);
      let row = this.rows.get(server.name);
      if (row === undefined) {
        row = new Row(server.name, this);
        row.words();
        this.rows.set(server.name, row);
        this.byRoot.set(row.root, row);
        this.watcher.observe(row.root);
        changed = true;
      } else if (!row.visible && !all) {
        row.server = server;
        const place = unseen++;
        if (place < this.turn || place >= this.turn + UNSEEN_AT_ONCE) continue;
      }
      row.show(server, snapshot.time);
    }
    this.turn = this.turn + UNSEEN_AT_ONCE < unseen ? this.turn + UNSEEN_AT_ONCE : 0;
    for (const name of gone) {
      const { root } = this.rows.get(name);
      this.watcher.unobserve(root);
      root.remove();
      this.rows.delete(name);
      changed = true;
    }
    if (changed) byId("fleet").toggleAttribute("data-many", this.rows.size > MANY);
    this.order(changed);
    this.showStates(snapshot.fleet.states);
    this.select();
  }

  /** The column whose order is shown: trouble comes first; "" is the order of the configuration. */
  orderedBy() {
    return this.sort ?? "state";
  }

  /** Put the rows in order; now and then only, and not under a hand that aims at one. */
  order(now) {
    const time = performance.now();
    const aiming = this.body.matches(":hover, :focus-within");
    const by = this.orderedBy();
    if (!now && (!by || aiming || time - this.sorted < SORT_EVERY)) return;
    this.sorted = time;
    const key = COLUMNS.find(({ id }) => id === by)?.key;
    const order = [...this.servers];
    if (key) {
      order.sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (typeof a === "string") return BY_NAME(a, b);
        return a - b;
      });
    }
    let place = this.body.firstElementChild;
    for (const { name } of order) {
      const { root } = this.rows.get(name);
      if (root === place) place = place.nextElementSibling;
      else this.body.insertBefore(root, place);
    }
    this.choice.value = by;
    for (const { column, cell } of this.titles) {
      if (column.id !== by || !column.key) cell.removeAttribute("aria-sort");
      else cell.setAttribute("aria-sort", column.id === "name" || column.id === "state" ? "ascending" : "descending");
    }
  }

  /** One button per state that occurs: how many, and a click shows only those. */
  showStates(states) {
    for (const state of [...BADNESS].reverse()) {
      let chip = this.chips.get(state);
      const n = states[state] ?? 0;
      if (chip === undefined) {
        if (n === 0) continue;
        const button = make("button", { type: "button", class: "chip", "data-state": state });
        button.addEventListener("click", () => {
          this.filter = this.filter === state ? null : state;
          toAddress("state", this.filter);
          this.select();
        });
        chip = {
          button, text: textOf(button), shown: shownIf(button),
          pressed: attributeOf(button, "aria-pressed"),
        };
        this.chips.set(state, chip);
        byId("states").append(button);
      }
      chip.text(`${n} ${t(`state_${state}`)}`);
      chip.shown(n > 0 || this.filter === state);
      chip.pressed(String(this.filter === state));
    }
  }

  /** Show only the servers that list one of these names of a model; null for all. */
  selectModel(names) {
    this.model = names;
    this.select();
  }

  select() {
    let shown = 0;
    for (const row of this.rows.values()) {
      const matches = row.matches(this.search, this.filter, this.model);
      row.set.shown(matches);
      shown += matches;
    }
    for (const [state, chip] of this.chips) chip.pressed(String(this.filter === state));
    const empty = byId("no-servers");
    empty.hidden = shown > 0;
    if (shown === 0) empty.textContent = t(this.rows.size === 0 ? "noServers" : "noMatch");
  }

  draw(history = this.history) {
    this.history = history;
    if (history === undefined) return;
    for (const [name, row] of this.rows) {
      if (row.visible) row.spark.draw(history.loads.get(name) ?? []);
    }
  }

  remeasure() {
    for (const row of this.rows.values()) row.spark.remeasure();
  }
}
