// The sources of servers: what each last said, how long ago, and what is wrong. One row per source.

import { appendCells, attributeOf, byId, make, textOf } from "./dom.js";
import { NONE, count, span } from "./format.js";
import { t } from "./i18n.js";
import { doubtText } from "./reasons.js";

const COLUMNS = [
  { id: "source", title: "colSource" },
  { id: "kind", title: "colKind" },
  { id: "state", title: "colState" },
  { id: "targets", title: "colTargets" },
  { id: "age", title: "colAge", figure: true },
  { id: "note", title: "colNote" },
];

const WORDS = { good: "sourceGood", waiting: "sourceWaiting", bad: "sourceBad", doubt: "sourceDoubt", part: "sourcePart" };

/** `bad` (cannot be read), `waiting` (never read), `doubt` (servers are kept), `part` (some left out), `good`. */
export function health({ problem, age, doubt, skipped }) {
  if (problem) return "bad";
  if (age === null) return "waiting";
  if (doubt) return "doubt";
  return skipped.length > 0 ? "part" : "good";
}

const TARGETS = { up: "targetsUp", drain: "targetsDrain", wait: "targetsWait" };

function targetsOf({ targets, age }) {
  if (age === null) return NONE;
  const parts = Object.keys(TARGETS).filter((state) => targets[state] > 0)
    .map((state) => t(TARGETS[state], { n: count(targets[state]) }));
  return parts.join(" · ") || "0";
}

class Row {
  constructor(name) {
    this.name = make("span", { class: "source-name" }, name);
    this.place = make("span", { class: "url" });
    this.state = make("span", { class: "chip" });
    this.kind = make("span");
    this.targets = make("span");
    this.note = make("span", { class: "source-note" });
    this.root = make("tr", { role: "row" });
    const contents = {
      source: [this.name, this.place], kind: [this.kind], state: [this.state], targets: [this.targets],
      age: [], note: [this.note],
    };
    this.set = {};
    appendCells(this.root, COLUMNS, { header: "source", prefix: "s", contents, set: this.set });
    Object.assign(this.set, {
      health: attributeOf(this.root, "data-health"),
      place: textOf(this.place),
      placeTitle: attributeOf(this.place, "title"),
      kind: textOf(this.kind),
      state: textOf(this.state),
      targets: textOf(this.targets),
      note: textOf(this.note),
    });
    this.words();
  }

  show(source) {
    const { set } = this;
    const state = health(source);
    set.health(state);
    set.state(t(WORDS[state]));
    set.place(source.place);
    set.placeTitle(source.place);
    set.kind(source.kind);
    set.targets(targetsOf(source));
    set.age(source.age === null ? NONE : span(source.age));
    set.note([source.problem, doubtText(source), ...source.skipped].filter(Boolean).join("\n"));
  }

  words() {
    for (const column of COLUMNS) this.set[`${column.id}Label`](t(column.title));
  }
}

export class Sources {
  constructor() {
    this.rows = new Map();
    this.sources = [];
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map((column) => {
      const title = make("span");
      row.append(make("th", {
        scope: "col", role: "columnheader", class: `s-${column.id}${column.figure ? " figure" : ""}`,
      }, title));
      return { column, title };
    });
    document.querySelector("#sources-table thead").append(row);
    this.body = document.querySelector("#sources-table tbody");
    this.words();
  }

  words() {
    for (const { column, title } of this.titles) title.textContent = t(column.title);
    for (const row of this.rows.values()) row.words();
    this.show(this.sources);
  }

  /** In the order of the configuration; the section is hidden if there are none. */
  show(sources) {
    this.sources = sources;
    const gone = new Set(this.rows.keys());
    let place = this.body.firstElementChild;
    for (const source of sources) {
      gone.delete(source.name);
      let row = this.rows.get(source.name);
      if (row === undefined) {
        row = new Row(source.name);
        this.rows.set(source.name, row);
      }
      row.show(source);
      if (row.root === place) place = place.nextElementSibling;
      else this.body.insertBefore(row.root, place);
    }
    for (const name of gone) {
      this.rows.get(name).root.remove();
      this.rows.delete(name);
    }
    byId("sources-section").hidden = sources.length === 0;
  }
}
