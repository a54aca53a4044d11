// The window over the page that asks before a server is drained or taken back.

import { byId } from "./dom.js";
import { ask } from "./fetch.js";
import { count } from "./format.js";
import { t } from "./i18n.js";

/** Ask before a server is drained or taken back, then do it. `done(text)` says what was done. */
export class Confirm {
  constructor(done) {
    this.done = done;
    this.dialog = byId("confirm");
    byId("confirm-yes").addEventListener("click", (event) => {
      event.preventDefault();
      this.act();
    });
  }

  ask(server, action) {
    this.asked = { server: server.name, action };
    const values = { server: server.name, n: count(server.leases) };
    byId("confirm-title").textContent = t(`${action}Title`, values);
    byId("confirm-text").textContent = t(`${action}Text`, values);
    byId("confirm-yes").textContent = t(action);
    byId("confirm-error").hidden = true;
    byId("confirm-yes").disabled = false;
    this.dialog.showModal();
    // What does nothing has the focus: Enter alone takes no server out.
    byId("confirm-no").focus();
  }

  async act() {
    byId("confirm-yes").disabled = true;
    const { asked } = this;
    const problem = await this.post(asked);
    const said = problem === null
      ? t(`${asked.action}Done`, { server: asked.server })
      : t("actionFailed", { reason: problem });
    // The router may answer after the window was closed, or asks about another server.
    if (asked !== this.asked || !this.dialog.open) {
      this.done(said);
      return;
    }
    byId("confirm-yes").disabled = false;
    if (problem === null) {
      this.dialog.close();
      this.done(said);
      return;
    }
    byId("confirm-error").textContent = said;
    byId("confirm-error").hidden = false;
  }

  /** null, or why not. */
  async post({ server, action }) {
    const path = `admin/servers/${encodeURIComponent(server)}/${action}`;
    return (await ask(path, { method: "POST" })).problem ?? null;
  }
}
