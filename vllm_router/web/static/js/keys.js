// The client keys that are used most: only for administrators, as the names are their users'.

import { appendCells, byId, make, textOf } from "./dom.js";
import { ask } from "./fetch.js";
import { count } from "./format.js";
import { t } from "./i18n.js";

const EVERY = 5000;

const COLUMNS = [
  { id: "key", title: "colKey" },
  { id: "requests", title: "colRequestsInFive", figure: true },
  { id: "tokens", title: "colTokensInFive", figure: true },
  { id: "refused", title: "colRefusedInFive", figure: true },
  { id: "share", title: "colKeyShare" },
];

class Row {
  constructor() {
    this.name = make("span", { class: "source-name" });
    this.bar = make("span", { class: "running" });
    this.root = make("tr", { role: "row" });
    const contents = {
      key: [this.name], requests: [], tokens: [], refused: [],
      share: [make("span", { class: "bar", "aria-hidden": "true" }, this.bar)],
    };
    this.set = {};
    appendCells(this.root, COLUMNS, { header: "key", prefix: "k", contents, set: this.set });
    this.set.name = textOf(this.name);
    this.words();
  }

  show(key, most) {
    const { set } = this;
    set.name(key.name);
    set.requests(count(key.requests));
    set.tokens(count(key.tokens));
    set.refused(count(key.refused));
    this.bar.style.setProperty("transform", `scaleX(${(key.requests / Math.max(1, most)).toFixed(3)})`);
  }

  words() {
    for (const column of COLUMNS) this.set[`${column.id}Label`](t(column.title));
  }
}

export class Keys {
  constructor() {
    this.rows = [];
    this.admin = false;
    this.shown = false;
    this.last = { keys: [], more: 0 };
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map((column) => {
      const title = make("span");
      row.append(make("th", {
        scope: "col", role: "columnheader", class: `k-${column.id}${column.figure ? " figure" : ""}`,
      }, title));
      return { column, title };
    });
    document.querySelector("#keys-table thead").append(row);
    this.body = document.querySelector("#keys-table tbody");
    this.words();
    setInterval(() => this.read(), EVERY);
  }

  words() {
    for (const { column, title } of this.titles) title.textContent = t(column.title);
    for (const row of this.rows) row.words();
    this.draw();
  }

  allow(admin) {
    this.admin = admin;
    this.read();
  }

  /** Whether the view of the fleet is shown. */
  show(shown) {
    this.shown = shown;
    this.read();
  }

  async read() {
    if (!this.admin || !this.shown || document.hidden) return;
    const found = await ask("admin/keys");
    if (found.keys) this.last = found;
    this.draw();
  }

  draw() {
    const { keys, more } = this.last;
    byId("keys-section").hidden = !this.admin || keys.length === 0;
    while (this.rows.length > keys.length) this.rows.pop().root.remove();
    keys.forEach((key, number) => {
      if (number === this.rows.length) {
        this.rows.push(new Row());
        this.body.append(this.rows[number].root);
      }
      this.rows[number].show(key, keys[0].requests);
    });
    byId("more-keys").textContent = more > 0 ? t("moreKeys", { n: count(more) }) : "";
  }
}
