// Why a server is in its state: the router sends a code with arguments, the page has the words.

import { t } from "./i18n.js";
import { en } from "./text.en.js";

/** The words for a reason; those of the router where the code is not known. */
export function reasonText({ reason, reason_code: code, reason_values: values }) {
  const key = `reason_${code}`;
  return code && Object.hasOwn(en, key) ? t(key, values) : reason ?? "";
}
