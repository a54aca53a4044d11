// The routers of the fleet (`[shared]`): this one first, then the others as it hears them. One row each.

import { appendCells, attributeOf, byId, make, textOf } from "./dom.js";
import { count, rate, span } from "./format.js";
import { t } from "./i18n.js";

const COLUMNS = [
  { id: "router", title: "colRouter" },
  { id: "state", title: "colState" },
  { id: "age", title: "colUptime", figure: true },
  { id: "flight", title: "colLeases", figure: true },
  { id: "rate", title: "colRequests", figure: true },
  { id: "note", title: "colNote" },
];

/** `own`, `gone` (silent), `part` (another configuration or version), or `good`. */
export function health(router, version) {
  if (router.own) return "own";
  if (!router.live) return "gone";
  return router.same_configuration && router.version === version ? "good" : "part";
}

const WORDS = { own: "routerOwn", gone: "routerGone", part: "routerDiffers", good: "routerGood" };

class Row {
  constructor() {
    this.name = make("span", { class: "source-name" });
    this.version = make("span", { class: "url" });
    this.state = make("span", { class: "chip" });
    this.note = make("span", { class: "source-note" });
    this.root = make("tr", { role: "row" });
    const contents = {
      router: [this.name, this.version], state: [this.state], age: [], flight: [], rate: [], note: [this.note],
    };
    this.set = {};
    appendCells(this.root, COLUMNS, { header: "router", prefix: "s", contents, set: this.set });
    Object.assign(this.set, {
      health: attributeOf(this.root, "data-health"),
      name: textOf(this.name),
      version: textOf(this.version),
      state: textOf(this.state),
      note: textOf(this.note),
    });
    this.words();
  }

  show(router, version) {
    const { set } = this;
    const state = health(router, version);
    set.health(state);
    set.name(router.name);
    set.version(router.version);
    set.state(t(WORDS[state]));
    set.age(span(router.uptime));
    set.flight(count(router.in_flight));
    set.rate(rate(router.requests_per_s));
    const notes = [];
    if (state === "gone") notes.push(t("noteSilent", { age: span(router.silent) }));
    if (!router.same_configuration) notes.push(t("noteConfiguration"));
    if (router.version !== version) notes.push(t("noteVersion", { version }));
    set.note(notes.join("\n"));
  }

  words() {
    for (const column of COLUMNS) this.set[`${column.id}Label`](t(column.title));
  }
}

export class Routers {
  constructor() {
    this.rows = [];
    this.last = null;
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map((column) => {
      const title = make("span");
      row.append(make("th", {
        scope: "col", role: "columnheader", class: `s-${column.id}${column.figure ? " figure" : ""}`,
      }, title));
      return { column, title };
    });
    document.querySelector("#routers-table thead").append(row);
    this.body = document.querySelector("#routers-table tbody");
    this.words();
  }

  words() {
    for (const { column, title } of this.titles) title.textContent = t(column.title);
    for (const row of this.rows) row.words();
    if (this.last !== null) this.show(...this.last);
  }

  /** The section is hidden without `[shared]`. */
  show({ router, fleet }, version) {
    this.last = [{ router, fleet }, version];
    const { shared } = router;
    byId("routers-section").hidden = !shared;
    if (!shared) return;
    const own = {
      own: true, name: shared.name, version, uptime: router.uptime, in_flight: fleet.leases,
      requests_per_s: fleet.requests_per_s, same_configuration: true,
    };
    const wanted = [own, ...shared.routers];
    while (this.rows.length > wanted.length) this.rows.pop().root.remove();
    wanted.forEach((one, number) => {
      if (number === this.rows.length) {
        this.rows.push(new Row());
        this.body.append(this.rows[number].root);
      }
      this.rows[number].show(one, version);
    });
  }
}
