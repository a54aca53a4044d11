// The connection to the feed: opens it, keeps it, says how it is.

import { keyProtocols, keyWanted, originProblem } from "./key.js";

const FIRST_PAUSE = 0.5;
const LONGEST_PAUSE = 10;
const CONNECT_TIMEOUT = 6;
/** Silence, in feed intervals but at least seconds, after which the figures are called old. */
const STALE_INTERVALS = 4;
const STALE_SECONDS = 2.5;
/** Silence in seconds after which the connection is taken for dead. */
const DEAD_SECONDS = 10;

const now = () => performance.now() / 1000;

/**
 * Calls `onMessage(message)` for each message and `onLink({state, age, retryIn})` about once a
 * second: `state` is `connecting` (never had one), `live`, `stale` (open and silent) or `lost`;
 * `age` is that of the last snapshot in seconds or null. Calls `onRefused()` if a key is wanted,
 * and `onProblem(text)` with what the router says against the page's origin, "" for nothing.
 */
export class Feed {
  constructor(onMessage, onLink, onRefused, onProblem) {
    this.onMessage = onMessage;
    this.onLink = onLink;
    this.onRefused = onRefused;
    this.onProblem = onProblem;
    this.socket = null;
    this.pause = FIRST_PAUSE;
    this.interval = 0.5;
    this.heard = null;
    this.opened = 0;
    this.timer = 0;
    this.retryAt = 0;
    setInterval(() => this.look(), 500);
    addEventListener("online", () => this.hurry());
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.hurry();
    });
    // A page in the back/forward cache may keep no socket.
    addEventListener("pagehide", () => this.drop());
    addEventListener("pageshow", (event) => event.persisted && this.hurry());
    this.open();
  }

  open() {
    clearTimeout(this.timer);
    this.timer = 0;
    const url = new URL("ws/load", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(url, keyProtocols());
    this.socket = socket;
    this.opened = now();
    this.live = false;
    socket.addEventListener("message", (event) => {
      if (socket !== this.socket) return;
      const message = JSON.parse(event.data);
      if (message.type === "hello") this.interval = message.config.feed_interval;
      if (message.type === "snapshot") {
        this.heard = now();
        this.pause = FIRST_PAUSE;
        if (!this.live) this.onProblem("");
        this.live = true;
      }
      this.onMessage(message);
      if (message.type === "snapshot") this.tell();
    });
    socket.addEventListener("close", () => {
      if (socket !== this.socket) return;
      // A browser does not say why it was refused.
      if (!this.live) {
        keyWanted().then((wanted) => wanted && this.onRefused());
        originProblem().then(this.onProblem);
      }
      this.lost();
    });
  }

  /** The connection is gone: try again, later each time, and not all pages at the same moment. */
  lost() {
    this.drop();
    const pause = this.pause * (0.75 + Math.random() / 2);
    this.pause = Math.min(this.pause * 1.7, LONGEST_PAUSE);
    this.retryAt = now() + pause;
    this.timer = setTimeout(() => this.open(), pause * 1000);
    this.tell();
  }

  drop() {
    const socket = this.socket;
    this.socket = null;
    this.live = false;
    if (socket) socket.close();
  }

  /** Once more, with another key. */
  again() {
    this.drop();
    this.hurry();
  }

  hurry() {
    if (this.socket === null) {
      this.pause = FIRST_PAUSE;
      this.open();
    }
  }

  silence() {
    return this.heard === null ? null : now() - this.heard;
  }

  look() {
    if (this.socket !== null) {
      const waited = this.live ? this.silence() : now() - this.opened;
      if (waited > (this.live ? DEAD_SECONDS + this.interval * STALE_INTERVALS : CONNECT_TIMEOUT)) {
        this.lost();
        return;
      }
    }
    this.tell();
  }

  tell() {
    const age = this.silence();
    let state = "live";
    if (!this.live) state = age === null ? "connecting" : "lost";
    else if (age > Math.max(STALE_SECONDS, this.interval * STALE_INTERVALS)) state = "stale";
    const retryIn = this.socket === null ? Math.max(0, this.retryAt - now()) : null;
    this.onLink({ state, age, retryIn });
  }
}
