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
    this.server = server.name;
    this.action = action;
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
    const problem = await this.post();
    byId("confirm-yes").disabled = false;
    if (problem === null) {
      this.dialog.close();
      this.done(t(`${this.action}Done`, { server: this.server }));
      return;
    }
    byId("confirm-error").textContent = t("actionFailed", { reason: problem });
    byId("confirm-error").hidden = false;
  }

  /** null, or why not. */
  async post() {
    const path = `admin/servers/${encodeURIComponent(this.server)}/${this.action}`;
    return (await ask(path, { method: "POST" })).problem ?? null;
  }
}
