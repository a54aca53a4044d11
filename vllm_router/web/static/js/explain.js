// Where would this request go? One sentence, then the terms.

import { fromAddress, toAddress } from "./address.js";
import { byId, make } from "./dom.js";
import { count, percent } from "./format.js";
import { ask } from "./fetch.js";
import { t } from "./i18n.js";
import { reasonText, termText } from "./reasons.js";

const figure = (value) => (Math.abs(value) < 10000 ? String(Number(value.toPrecision(4))) : count(value));

/** Why the first candidate wins, in the order of what weighs most for people. */
function why(found) {
  const [first, ...others] = found.candidates;
  if (others.length === 0) return t("whyOnly");
  const parts = [];
  const cached = first.parts?.cached_tokens ?? 0;
  if (cached >= 1) parts.push(t("whyCached", { n: count(cached) }));
  if (others.every((other) => other.load >= first.load)) parts.push(t("whyLeastLoad", { load: percent(first.load) }));
  else parts.push(t("whyLoad", { load: percent(first.load) }));
  if (first.score !== null && others[0].score === first.score) {
    // The note says it, with their number.
    if (found.note_code !== "equal_servers") parts.push(t("whyEqual"));
  } else if (first.score !== null) parts.push(t("whyScore", { score: figure(first.score), next: figure(others[0].score) }));
  return parts.join(t("listComma"));
}

export function sentence(found) {
  const model = found.model ?? t("anyModel");
  if (found.picked) {
    const served = found.served_model && found.served_model !== found.model
      ? t("explainServed", { model: found.served_model }) : "";
    return t("explainPicked", { model, server: found.picked, why: why(found) }) + served;
  }
  return t(found.would_wait ? "explainWaits" : "explainRefused", { model });
}

export class Explain {
  constructor() {
    this.model = byId("explain-model");
    this.body = byId("explain-body");
    this.model.value = fromAddress("ask") ?? "";
    byId("explain-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.read();
    });
  }

  /** Offers the models' names. */
  models(names) {
    const key = names.join("\n");
    if (key === this.names) return;
    this.names = key;
    byId("explain-models").replaceChildren(...names.map((name) => make("option", { value: name })));
    if (!this.model.value && names.length > 0) [this.model.value] = names;
    this.show(this.shown);
  }

  show(shown) {
    this.shown = shown;
    if (shown && !this.found && this.model.value) this.read();
  }

  words() {
    if (this.found) this.draw();
  }

  async read() {
    const model = this.model.value.trim();
    toAddress("ask", model);
    const body = this.body.value.trim();
    this.asked = (this.asked ?? 0) + 1;
    const turn = this.asked;
    const found = body
      ? await ask("explain", { method: "POST", body, headers: { "content-type": "application/json" } })
      : await ask(`explain${model ? `?model=${encodeURIComponent(model)}` : ""}`);
    if (turn !== this.asked) return; // asked something else meanwhile
    this.found = found;
    this.draw();
  }

  draw() {
    const { found } = this;
    const result = byId("explain-result");
    if (found.problem) {
      result.replaceChildren(make("p", { class: "problem", role: "alert" }, found.problem));
      return;
    }
    const terms = Object.keys(found.candidates[0]?.parts ?? {})
      .filter((name) => found.candidates.some((row) => row.parts[name]));
    const title = (text, kind) => make("th", { scope: "col", role: "columnheader", class: kind }, text);
    const head = [
      title(t("colServer")),
      ...[t("colLoad"), t("colScore"), ...terms.map(termText)].map((text) => title(text, "figure")),
      title(t("colWhyOut"), "why"),
    ];
    const line = (row, figures, whyNot = "") => make("tr", { role: "row", "data-picked": row.server === found.picked || null },
      make("th", { scope: "row", role: "rowheader" }, row.server),
      ...[percent(row.load), ...figures].map((text) => make("td", { role: "cell", class: "figure" }, text)),
      make("td", { role: "cell", class: "why" }, whyNot));
    const blank = ["", ...terms.map(() => "")];
    // A server that is up is left out for its reason alone.
    const whyOut = (row) => (row.state === "up" ? reasonText(row)
      : t("stateAndReason", { state: t(`state_${row.state}`), reason: reasonText(row) }));
    result.replaceChildren(
      make("p", { class: "verdict" }, sentence(found)),
      ...(found.note ? [make("p", { class: "quiet" }, reasonText(found, "note"))] : []),
      make("p", { class: "quiet" }, t("explainPolicy", { policy: found.policy })),
      make("div", { class: "panel table-panel", tabindex: "0", role: "region", "aria-label": t("explainTable") },
        make("table", { role: "table" },
          make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head)),
          make("tbody", { role: "rowgroup" },
            ...found.candidates.map((row) => line(row, [
              row.score === null ? "" : figure(row.score),
              ...terms.map((name) => figure(row.parts[name] ?? 0)),
            ])),
            ...found.out.map((row) => line(row, blank, whyOut(row)))))),
      ...(found.formula ? [make("pre", { class: "formula" }, found.formula.replaceAll("; ", "\n"))] : []),
    );
  }
}
