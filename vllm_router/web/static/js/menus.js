// Small windows below their buttons: the browser opens and closes them (popovertarget), this places them.

import { byId } from "./dom.js";

const GAP = 6;

/** Place the menu below its button whenever it is opened: at the side of the window where the button is. */
export function placeMenu(menuId, buttonId) {
  const [menu, button] = [byId(menuId), byId(buttonId)];
  menu.addEventListener("beforetoggle", (event) => {
    if (event.newState !== "open") return;
    const { left, right, bottom } = button.getBoundingClientRect();
    const width = document.documentElement.clientWidth;
    const atRight = left + right > width;
    menu.style.setProperty("top", `${bottom + GAP}px`);
    menu.style.setProperty("left", atRight ? "auto" : `${left}px`);
    menu.style.setProperty("right", atRight ? `${width - right}px` : "auto");
  });
}
