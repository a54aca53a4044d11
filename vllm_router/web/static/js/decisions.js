// The last requests: where each went, how often it was tried, and how it ended.

import { fromAddress, toAddress } from "./address.js";
import { byId, make } from "./dom.js";
import { NONE, clock, moment, seconds } from "./format.js";
import { ask } from "./fetch.js";
import { t } from "./i18n.js";
import { outcomeText } from "./reasons.js";

const EVERY = 2000;
const SHOWN = 200;

/** When a request has ended, by which the router sorts them. */
export const ended = (row) => row.time + (row.duration_seconds ?? 0);

const COLUMNS = [
  ["colEnded", (row) => clock(ended(row))],
  ["colModel", (row) => (row.served_model ? `${row.model} → ${row.served_model}` : row.model ?? NONE)],
  ["colServer", (row) => row.server ?? NONE],
  ["colStatus", (row) => `${row.status || NONE} ${outcomeText(row.code ?? row.outcome)}`],
  ["colAttempts", (row) => [row.attempts, ...row.retries.map(outcomeText)].join(", ")],
  ["colWaited", (row) => (row.waited_seconds ? seconds(row.waited_seconds) : NONE)],
  ["colFirst", (row) => seconds(row.first_byte_seconds)],
  ["colDuration", (row) => seconds(row.duration_seconds)],
  ["colPath", (row) => row.path],
];

export class Decisions {
  constructor() {
    this.search = byId("decisions-search");
    this.failed = byId("decisions-failed");
    this.search.value = fromAddress("find") ?? "";
    this.failed.checked = fromAddress("failed") === "1";
    this.search.addEventListener("input", () => {
      toAddress("find", this.search.value.trim());
      this.draw();
    });
    this.failed.addEventListener("change", () => {
      toAddress("failed", this.failed.checked ? "1" : "");
      this.read();
    });
    this.rows = [];
    this.shown = false;
    this.asked = 0;
    this.answered = 0;
    const row = make("tr", { role: "row" });
    this.titles = COLUMNS.map(([title], index) => {
      const cell = make("th", { scope: "col", role: "columnheader", class: `d-${index}` });
      row.append(cell);
      return { title, cell };
    });
    document.querySelector("#decisions-table thead").append(row);
    this.words();
    setInterval(() => this.read(), EVERY);
  }

  words() {
    for (const { title, cell } of this.titles) cell.textContent = t(title);
    this.draw();
  }

  show(shown) {
    this.shown = shown;
    this.read();
  }

  async read() {
    if (!this.shown || document.hidden) return;
    const failed = this.failed.checked;
    this.asked += 1;
    const turn = this.asked;
    const found = await ask(`decisions?limit=${SHOWN}${failed ? "&failed=1" : ""}`);
    // A late answer does not replace a newer one, nor the answer to another question.
    if (turn < this.answered || failed !== this.failed.checked) return;
    this.answered = turn;
    this.problem = found.problem ?? "";
    if (found.decisions) this.rows = found.decisions;
    this.draw();
  }

  draw() {
    const wanted = this.search.value.trim().toLowerCase();
    const rows = this.rows.filter((row) => wanted === ""
      || [row.model, row.served_model, row.server, row.request_id, row.code, row.outcome, row.path]
        .some((text) => text?.toLowerCase().includes(wanted)));
    document.querySelector("#decisions-table tbody").replaceChildren(...rows.map((row) => make(
      "tr", { role: "row", "data-mood": row.failed ? "bad" : null, title: `${moment(row.time)} · ${row.request_id}` },
      ...COLUMNS.map(([title, read], index) => make("td", {
        role: "cell", class: `d-${index}`, "data-label": t(title),
      }, String(read(row)))),
    )));
    const empty = byId("no-decisions");
    empty.hidden = rows.length > 0 && !this.problem;
    empty.textContent = this.problem || t(this.rows.length === 0 ? "noDecisions" : "noMatchingDecisions");
  }
}
