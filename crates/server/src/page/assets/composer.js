// The message field, its images, and the button that sends or stops.

import { byId, element, randomId } from "./dom.js";

const TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/gif", "image/bmp"]);

/** @typedef {{id: string, blob: Blob, name: string}} Picture */

export class Composer {
  #form = byId("composer", HTMLFormElement);
  #message = byId("message", HTMLTextAreaElement);
  #send = byId("send", HTMLButtonElement);
  #files = byId("files", HTMLInputElement);
  #previews = byId("previews", HTMLUListElement);
  #problem = byId("composer-problem", HTMLElement);
  /** @type {(Picture & {url: string})[]} */
  #pictures = [];
  #isBusy = false;

  /**
   * @param {(text: string, pictures: Picture[]) => boolean} onSend whether the message was taken
   * @param {() => void} onStop
   */
  constructor(onSend, onStop) {
    this.onSend = onSend;
    this.onStop = onStop;
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#isBusy) this.onStop();
      else this.#submit();
    });
    this.#message.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !this.#isBusy) {
        event.preventDefault();
        this.#submit();
      }
    });
    this.#message.addEventListener("input", () => this.#fit());
    byId("choose", HTMLButtonElement).addEventListener("click", () => this.#files.click());
    this.#files.addEventListener("change", () => {
      this.addFiles(this.#files.files ?? []);
      this.#files.value = "";
    });
    this.#takePastes();
    this.#takeDrops();
  }

  /** @param {boolean} isBusy an answer comes: the button stops it */
  setBusy(isBusy) {
    this.#isBusy = isBusy;
    this.#send.textContent = isBusy ? "Stop" : "Send";
    this.#send.classList.toggle("stop", isBusy);
  }

  focus() {
    this.#message.focus();
  }

  /**
   * Puts a message back.
   *
   * @param {string} text
   * @param {Picture[]} pictures
   */
  fill(text, pictures) {
    this.#message.value = text;
    this.#clearPictures();
    for (const picture of pictures) this.#add(picture);
    this.#showPictures();
    this.#fit();
    this.focus();
  }

  /** @param {Iterable<File>} files */
  addFiles(files) {
    const refused = [];
    for (const file of files) {
      if (TYPES.has(file.type)) this.#add({ id: randomId(), blob: file, name: file.name || "pasted image" });
      else refused.push(file.name || file.type || "that");
    }
    this.complain(refused.length === 0 ? null : `Not an image that can be sent (PNG, JPEG, WebP, GIF, BMP): ${refused.join(", ")}`);
    this.#showPictures();
    this.focus();
  }

  #submit() {
    const text = this.#message.value;
    if (text.trim() === "" && this.#pictures.length === 0) {
      this.complain("Write a message, or add an image.");
      this.focus();
      return;
    }
    this.complain(null);
    if (!this.onSend(text, this.#pictures.map(({ id, blob, name }) => ({ id, blob, name })))) return;
    this.#message.value = "";
    this.#clearPictures();
    this.#showPictures();
    this.#fit();
    this.focus();
  }

  /** @param {string | null} text what is wrong, under the eyes of who writes */
  complain(text) {
    this.#problem.hidden = text === null;
    this.#problem.textContent = text ?? "";
  }

  /** The field is as high as its text, up to what the style allows. */
  #fit() {
    this.#message.style.height = "auto";
    this.#message.style.height = `${this.#message.scrollHeight + 2}px`;
  }

  /** @param {Picture} picture */
  #add(picture) {
    this.#pictures.push({ ...picture, url: URL.createObjectURL(picture.blob) });
  }

  #clearPictures() {
    for (const { url } of this.#pictures) URL.revokeObjectURL(url);
    this.#pictures = [];
  }

  #showPictures() {
    this.#previews.hidden = this.#pictures.length === 0;
    this.#previews.replaceChildren(
      ...this.#pictures.map((picture) => {
        const image = element("img", { src: picture.url, alt: picture.name });
        const remove = element("button", { type: "button", class: "remove", "aria-label": `Remove ${picture.name}` }, "×");
        remove.addEventListener("click", () => {
          URL.revokeObjectURL(picture.url);
          this.#pictures = this.#pictures.filter(({ id }) => id !== picture.id);
          this.#showPictures();
          this.focus();
        });
        return element("li", {}, image, remove);
      }),
    );
  }

  #takePastes() {
    document.addEventListener("paste", (event) => {
      const files = Array.from(event.clipboardData?.files ?? []);
      if (files.length === 0) return;
      event.preventDefault();
      this.addFiles(files);
    });
  }

  #takeDrops() {
    const veil = byId("drop", HTMLElement);
    const hasFiles = (/** @type {DragEvent} */ event) => event.dataTransfer?.types.includes("Files") ?? false;
    document.addEventListener("dragover", (event) => {
      if (!hasFiles(event)) return;
      // Else the browser would open the file in place of the page.
      event.preventDefault();
      veil.hidden = false;
    });
    document.addEventListener("dragleave", (event) => {
      if (event.relatedTarget === null) veil.hidden = true;
    });
    document.addEventListener("drop", (event) => {
      veil.hidden = true;
      if (!hasFiles(event)) return;
      event.preventDefault();
      this.addFiles(event.dataTransfer?.files ?? []);
    });
  }
}
