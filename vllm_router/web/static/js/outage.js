// The one sentence that an operator must read first.

import { clock } from "./format.js";
import { t } from "./i18n.js";

/** From this share of the servers on, servers that are down belong into the sentence. */
const MANY = 0.5;
const SICK = ["down", "ejected", "silent"];

/** Models without a server or a fallback, and the servers that are down if they are many. */
export function outageText({ models = [], fleet }) {
  const out = models.filter(({ without_server_since: since, fallback }) => since && !fallback);
  const sick = SICK.reduce((sum, state) => sum + (fleet.states[state] ?? 0), 0);
  const parts = [];
  if (out.length > 0) {
    const since = clock(Math.min(...out.map((model) => model.without_server_since)), false);
    parts.push(out.length === 1
      ? t("bannerModel", { model: out[0].name, since })
      : t("bannerModels", { n: out.length, since }));
  }
  if (sick > 0 && sick >= fleet.servers * MANY && (out.length > 0 || fleet.servers > 1)) {
    parts.push(t("bannerServers", { n: sick, all: fleet.servers }));
  }
  return parts.join(t("reasonJoin"));
}
