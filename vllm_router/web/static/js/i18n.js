// Two languages. The router sends codes with values; what it sends in words alone stays as it is.

import { en } from "./text.en.js";
import { zh } from "./text.zh.js";
import { fromAddress } from "./address.js";
import { store, stored } from "./dom.js";

const TEXTS = { en, zh };
const TAGS = { en: "en", zh: "zh-CN" };

let current = "en";

export const language = () => TAGS[current];
export const languageKey = () => current;

/** The text of a key, with `{name}` replaced from `values`. */
export function t(key, values) {
  const text = TEXTS[current][key] ?? en[key] ?? key;
  return values ? text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? "")) : text;
}

export function preferred() {
  const kept = fromAddress("language") ?? stored("language");
  if (kept !== null && Object.hasOwn(TEXTS, kept)) return kept;
  const wanted = navigator.languages?.length ? navigator.languages : [navigator.language];
  for (const tag of wanted) {
    const key = tag.toLowerCase().split("-")[0];
    if (Object.hasOwn(TEXTS, key)) return key;
  }
  return "en";
}

/** Switch, keep the choice if it is one, and rewrite what the page's markup names. */
export function use(key, keep = false) {
  current = Object.hasOwn(TEXTS, key) ? key : "en";
  if (keep) store("language", current);
  document.documentElement.lang = language();
  for (const node of document.querySelectorAll("[data-i18n]")) {
    node.textContent = t(node.dataset.i18n);
  }
  for (const node of document.querySelectorAll("[data-i18n-label]")) {
    node.setAttribute("aria-label", t(node.dataset.i18nLabel));
  }
  for (const node of document.querySelectorAll("[data-i18n-placeholder]")) {
    node.setAttribute("placeholder", t(node.dataset.i18nPlaceholder));
  }
}
