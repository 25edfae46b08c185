// On narrow screens the two side columns are drawers: shut ones are out of reach of keyboard and screen
// reader, an open one takes the focus and gives it back.

import { byId } from "./dom.js";

/** As in style.css. */
const NARROW = { conversations: "(max-width: 55rem)", panel: "(max-width: 75rem)" };

class Drawer {
  /** @param {"conversations" | "panel"} id */
  constructor(id) {
    this.element = byId(id, HTMLElement);
    this.button = byId(`show-${id}`, HTMLButtonElement);
    this.narrow = matchMedia(NARROW[id]);
    this.isOpen = false;
  }

  update() {
    this.element.classList.toggle("open", this.isOpen);
    this.element.inert = this.narrow.matches && !this.isOpen;
    this.button.hidden = !this.narrow.matches;
    this.button.setAttribute("aria-expanded", String(this.isOpen));
  }
}

export class Drawers {
  #drawers = [new Drawer("conversations"), new Drawer("panel")];
  #backdrop = byId("backdrop", HTMLElement);

  constructor() {
    for (const drawer of this.#drawers) {
      drawer.button.addEventListener("click", () => {
        const wasOpen = drawer.isOpen;
        this.close();
        if (!wasOpen) this.#open(drawer);
      });
      drawer.element.querySelector(".close")?.addEventListener("click", () => this.close());
      drawer.narrow.addEventListener("change", () => {
        drawer.isOpen = false;
        this.#update();
      });
    }
    this.#backdrop.addEventListener("click", () => this.close());
    this.#update();
  }

  /** Opens the drawer that a control is in, if it is in one. */
  openFor(/** @type {HTMLElement} */ control) {
    const drawer = this.#drawers.find(({ element }) => element.contains(control));
    if (drawer?.narrow.matches) this.#open(drawer);
  }

  /** @returns {boolean} whether one was open */
  close() {
    const open = this.#drawers.find((drawer) => drawer.isOpen);
    if (open === undefined) return false;
    open.isOpen = false;
    const hadFocus = open.element.contains(document.activeElement);
    this.#update();
    if (hadFocus) open.button.focus();
    return true;
  }

  /** @param {Drawer} drawer */
  #open(drawer) {
    drawer.isOpen = true;
    this.#update();
    /** @type {HTMLElement | null} */ (drawer.element.querySelector("button, input, textarea, summary"))?.focus();
  }

  #update() {
    for (const drawer of this.#drawers) drawer.update();
    this.#backdrop.hidden = !this.#drawers.some((drawer) => drawer.isOpen);
  }
}
