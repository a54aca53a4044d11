// Questions to the router beside the feed.

import { t } from "./i18n.js";
import { keyHeaders } from "./key.js";
import { refusalText } from "./reasons.js";

/** The answer's JSON; `{problem}` with the reason in words if there is none. */
export async function ask(path, options = {}) {
  try {
    const answer = await fetch(path, {
      ...options, headers: { ...keyHeaders(), ...options.headers }, signal: AbortSignal.timeout(8000),
    });
    const page = await answer.json().catch(() => null);
    if (answer.ok && page !== null) return page;
    return { problem: page?.error ? refusalText(page.error) : String(answer.status) };
  } catch {
    return { problem: t("unreachable") };
  }
}
