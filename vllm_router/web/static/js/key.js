// The key of a router that wants one. Kept for this tab, until it is closed.

import { byId } from "./dom.js";
import { t } from "./i18n.js";
import { refusalText } from "./reasons.js";

const NAME = "vllm-router.key";

let key = "";
try {
  key = sessionStorage.getItem(NAME) ?? "";
} catch {
  // Storage is forbidden here: it holds until the page is left.
}

function keep(given) {
  key = given;
  try {
    sessionStorage.setItem(NAME, key);
  } catch {
    // As above.
  }
}

/**
 * `vllm-router open` has put a code into the fragment of our URL: exchange it for a key.
 * Returns "" if that worked, else why not, in words; null if there is no code.
 */
export async function signIn() {
  const found = /^#sign-in=([\w-]+)$/.exec(location.hash);
  if (found === null) return null;
  // Out of the address bar and the browser's history.
  history.replaceState(null, "", location.pathname + location.search);
  try {
    const answer = await fetch("sign-in", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ code: found[1] }),
      signal: AbortSignal.timeout(8000),
    });
    const page = await answer.json();
    if (!answer.ok) return page.error ? refusalText(page.error) : String(answer.status);
    keep(page.key);
    return "";
  } catch {
    return t("unreachable");
  }
}

/** For fetch. */
export const keyHeaders = () => (key ? { authorization: `Bearer ${key}` } : {});

/** For a websocket, which can send no header: the key as a subprotocol, in base64url. */
export function keyProtocols() {
  if (!key) return [];
  const token = btoa(key).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
  return ["vllm-router.feed", `vllm-router.key.${token}`];
}

/** Whether the router refuses to tell its state for want of a key, or of another one. */
export async function keyWanted() {
  try {
    const answer = await fetch("load-stats", { headers: keyHeaders(), signal: AbortSignal.timeout(5000) });
    return answer.status === 401;
  } catch {
    return false; // not there: no question of keys
  }
}

/**
 * What the router says against this page's origin, or "". A browser keeps the answer to a refused
 * websocket to itself; the router answers a POST at the same path in the same words.
 */
export async function originProblem() {
  try {
    const answer = await fetch("ws/load", { method: "POST", headers: keyHeaders(), signal: AbortSignal.timeout(5000) });
    if (answer.status !== 403) return "";
    return refusalText({ ...(await answer.json()).error, values: { origin: location.origin } });
  } catch {
    return ""; // not there: no question of origins
  }
}

/** Asks for the key; calls `changed()` for another key in force, `declined()` for none. */
export class KeyDialog {
  constructor(changed, declined) {
    this.dialog = byId("key-dialog");
    this.input = byId("key-input");
    this.button = byId("key");
    this.declined = false;
    this.button.addEventListener("click", () => this.open(""));
    // Enter in the field and the button both submit the form.
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      keep(this.input.value.trim().replace(/[^!-~]/g, ""));
      this.dialog.close();
      changed();
    });
    this.dialog.addEventListener("close", () => { this.input.value = ""; });
    const decline = () => { this.declined = true; declined(); };
    this.dialog.addEventListener("cancel", decline);
    byId("key-no").addEventListener("click", () => {
      decline();
      this.dialog.close();
    });
  }

  /** The router has refused us; asked once, then only by the button. */
  refused() {
    this.offer(true);
    if (this.dialog.open || this.declined) return;
    this.open(key ? t("keyWrong") : "");
  }

  /** Show the button, for those who could do more with a key. */
  offer(wanted) {
    this.button.hidden = !wanted;
  }

  open(problem) {
    byId("key-command").textContent = `vllm-router open ${location.origin}`;
    byId("key-error").textContent = problem;
    byId("key-error").hidden = !problem;
    this.dialog.showModal();
    this.input.focus();
  }
}
