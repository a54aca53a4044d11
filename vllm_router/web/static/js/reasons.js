// What the router says as codes with values: the page has the words.

import { languageKey, t } from "./i18n.js";
import { said } from "./said.en.js";

function phrase({ code, values }) {
  const text = t(`reason_${code}`, values);
  return values.in_row ? t("reasonInRow", { text, n: values.in_row }) : text;
}

/**
 * The words for a reason; those of the router if it has a code that this page does not know.
 * `name` begins the names of its fields.
 */
export function reasonText(from, name = "reason") {
  const also = from[`${name}_also`] ?? [];
  const phrases = [{ code: from[`${name}_code`], values: from[`${name}_values`] ?? {} }, ...also];
  if (!phrases.every(({ code }) => code && Object.hasOwn(said, `reason_${code}`))) return from[name] ?? "";
  return phrases.map(phrase).join(t("reasonJoin"));
}

/** The words of an event; those of the router if it has a code that this page does not know. */
export function saidText({ text, text_code: code, text_values: values }) {
  if (!code || !Object.hasOwn(said, `event_${code}`)) return text;
  const more = {
    request_failed: () => ({ why: outcomeText(values.why) }),
    source_doubt: () => ({ doubt: doubtText({ doubt: values.doubt, doubt_values: values }) }),
  }[code];
  return t(`event_${code}`, { ...values, ...more?.() });
}

/** Why servers stay that a source does not name any more. */
export const doubtText = ({ doubt, doubt_values: values }) =>
  (values?.kept && languageKey() !== "en" ? t("doubtKept", values) : doubt);

/**
 * The words of an error of the router, `{code, message, values}`: its own in English, and for a code
 * that this page does not know.
 */
export function refusalText({ code, message, values }) {
  if (languageKey() === "en" || !Object.hasOwn(said, `refusal_${code}`)) return message;
  return t(`refusal_${code}`, values);
}

/** The word for a code of the router, which is shown as it is if the page does not know it. */
const word = (kind, code) => (Object.hasOwn(said, `${kind}_${code}`) ? t(`${kind}_${code}`) : code);

/** How a request ended, or why an attempt failed: an outcome or an error code. */
export const outcomeText = (code) => word("outcome", code);

/** The name of a term of a score. */
export const termText = (code) => word("term", code);
