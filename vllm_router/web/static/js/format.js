// Figures as people read them, in the page's language.

import { language, t } from "./i18n.js";

let spoken = null;
let formats = [];

/** Formats are dear to make and to find, and this is called a thousand times a snapshot. */
function number(value, digits) {
  if (spoken !== language()) {
    spoken = language();
    formats = [];
  }
  formats[digits] ??= new Intl.NumberFormat(spoken, {
    minimumFractionDigits: digits, maximumFractionDigits: digits,
  });
  return formats[digits].format(value);
}

export const NONE = "–";

export const count = (value) => number(Math.round(value), 0);

/** Per second: as many digits as mean something. */
export function rate(value) {
  if (value === null || value === undefined) return NONE;
  if (value === 0) return "0";
  if (value < 1) return number(value, 2);
  return number(value, value < 10 ? 1 : 0);
}

export const percent = (share) =>
  (share === null || share === undefined ? NONE : `${number(share * 100, 0)} %`);

export function seconds(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 1) return `${number(value * 1000, 0)} ms`;
  if (value < 100) return `${number(value, value < 10 ? 2 : 1)} s`;
  return `${number(value, 0)} s`;
}

/** A percentile: its buckets are 5 % wide, so two digits mean something. */
export function latency(value) {
  if (value === null || value === undefined) return NONE;
  if (value < 0.0095) return `${number(value * 1000, 1)} ms`;
  if (value < 0.995) return `${number(Number((value * 1000).toPrecision(2)), 0)} ms`;
  const rounded = Number(value.toPrecision(2));
  return `${number(rounded, rounded < 10 ? 1 : 0)} s`;
}

/** At an axis: no digits that are zero. */
export function axisSeconds(value) {
  if (value === 0) return "0";
  if (value < 1) return `${Number((value * 1000).toFixed(1))} ms`;
  return `${Number(value.toFixed(2))} s`;
}

/** At an axis: thousands as k, as the labels have little room. */
export function axisCount(value) {
  if (value >= 1000) return `${Number((value / 1000).toFixed(1))}k`;
  return String(Number(value.toFixed(2)));
}

export const megabytes = (bytes) => `${number(bytes / 1e6, 0)} MB`;

/** A span in its greatest unit. */
export function span(value) {
  const whole = Math.max(0, Math.floor(value));
  if (whole < 60) return t("spanSeconds", { n: whole });
  if (whole < 3600) return t("spanMinutes", { n: Math.floor(whole / 60) });
  if (whole < 86400) {
    return t("spanHours", { n: Math.floor(whole / 3600), m: Math.floor((whole % 3600) / 60) });
  }
  return t("spanDays", { n: Math.floor(whole / 86400) });
}

const pad = (value) => String(value).padStart(2, "0");

/** The time of day of a Unix time, in the reader's zone. */
export function clock(time, withSeconds = true) {
  const date = new Date(time * 1000);
  const minutes = `${pad(date.getHours())}:${pad(date.getMinutes())}`;
  return withSeconds ? `${minutes}:${pad(date.getSeconds())}` : minutes;
}

export const moment = (time) =>
  new Date(time * 1000).toLocaleString(language(), { dateStyle: "medium", timeStyle: "medium" });
