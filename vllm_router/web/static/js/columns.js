// Which columns of the servers are shown: a choice that is kept, and part of the address.

import { fromAddress, toAddress } from "./address.js";
import { byId, make, store, stored } from "./dom.js";
import { t } from "./i18n.js";
import { placeMenu } from "./menus.js";

/** The name, the state and the load are always there. */
const CHOICES = {
  trend: "colTrend", leases: "colLeases", requests: "colRequests", tokens: "colTokens",
  ttft: "colTtft", errors: "colErrors", kv: "colKv", models: "colModels",
};

export class Columns {
  /** `onChange()` is called when columns have come or gone. */
  constructor(onChange) {
    this.onChange = onChange;
    const kept = fromAddress("hide") ?? stored("hide") ?? "";
    this.hidden = new Set(kept.split(",").filter((id) => Object.hasOwn(CHOICES, id)));
    this.labels = Object.entries(CHOICES).map(([id, title]) => {
      const box = make("input", { type: "checkbox", id: `column-${id}` });
      box.checked = !this.hidden.has(id);
      box.addEventListener("change", () => this.choose(id, box.checked));
      const name = make("span");
      byId("columns-menu").append(make("label", { class: "check" }, box, name));
      return { title, name };
    });
    placeMenu("columns-menu", "columns");
    this.apply();
    this.words();
  }

  choose(id, shown) {
    if (shown) this.hidden.delete(id);
    else this.hidden.add(id);
    const value = [...this.hidden].join(",");
    store("hide", value);
    toAddress("hide", value);
    this.apply();
    this.onChange();
  }

  apply() {
    byId("fleet").dataset.hidden = [...this.hidden].join(" ");
  }

  words() {
    for (const { title, name } of this.labels) name.textContent = t(title);
  }
}
