// The bar of a load. Up to the capacity it is linear, beyond it logarithmic: a load of 106 % and
// one of 1000 % look different. The mark is the capacity.

import { attributeOf, make, styleOf, textOf } from "./dom.js";
import { count, percent } from "./format.js";
import { t } from "./i18n.js";

/** How full a load is, for colours: the same steps as in the terminal. */
export const heat = (load) => (load >= 0.9 ? "high" : load >= 0.7 ? "some" : "low");

const MARK = 0.62;

/** The words for a capacity that is not configured. */
const CAPACITY = { learnt: "loadOfLearnt", assumed: "loadOfAssumed" };

/** The place of a share of the capacity in the bar, 0 to 1; 1 is ten times the capacity. */
export const placeOf = (share) =>
  (share <= 1 ? Math.max(0, share) * MARK : Math.min(1, MARK + (1 - MARK) * Math.log10(share)));

export class LoadBar {
  constructor() {
    this.running = make("span", { class: "running" });
    this.waiting = make("span", { class: "waiting" });
    this.limit = make("span", { class: "limit" });
    this.bar = make("span", { class: "bar", "aria-hidden": "true" }, this.running, this.waiting, this.limit);
    this.text = make("span", { class: "load-text" });
    this.share = make("b", { class: "load-share" });
    this.line = make("span", { class: "load-line" }, this.text, this.share);
    this.parts = [this.line, this.bar];
    this.limit.style.left = `${100 * MARK}%`;
    this.set = {
      text: textOf(this.text), share: textOf(this.share),
      heat: attributeOf(this.bar, "data-heat"),
      // Transforms, as a change of width would lay the whole table out anew.
      running: styleOf(this.running, "transform"), waiting: styleOf(this.waiting, "transform"),
    };
  }

  /** `exact` is false if the load is an estimate; `source` says where the capacity is from. */
  show({ running, waiting, capacity, load, exact = true, source = "configured" }) {
    const { set } = this;
    const place = (value) => (capacity > 0 ? placeOf(value / capacity) : value > 0 ? 1 : 0);
    const [first, last] = [place(running), place(running + waiting)];
    set.running(`scaleX(${first.toFixed(3)})`);
    set.waiting(`translateX(${(100 * first).toFixed(1)}%) scaleX(${(last - first).toFixed(3)})`);
    set.heat(heat(load));
    const figures = { running: count(running), waiting: count(waiting), capacity: count(capacity) };
    const parts = [t(CAPACITY[source] ?? "loadOf", figures)];
    if (waiting > 0) parts.push(t("loadWaiting", figures));
    set.text(parts.join(" · "));
    set.share((exact ? "" : "≈ ") + percent(load));
  }
}
