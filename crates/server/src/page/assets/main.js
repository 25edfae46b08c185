// Puts the parts together: which conversation is shown, which answer comes in, who has the key.

import { Announcer } from "./announcer.js";
import { listenForColours } from "./appearance.js";
import { ApiError, listModels, readVersion, streamChat } from "./api.js";
import { Composer } from "./composer.js";
import {
  concernsConversations, loadConversations, newConversation, newMessage, removeConversation, saveConversation, thingsInUse, thingsOf, titleOf,
} from "./conversations.js";
import { byId, element, randomId } from "./dom.js";
import { Drawers } from "./drawers.js";
import { Live } from "./live.js";
import { reportsIn } from "./overlay.js";
import { chatBody, hasImages, noteOf } from "./requests.js";
import { Settings } from "./settings.js";
import { Transcript } from "./transcript.js";
import { find, forget, keep, sweep } from "./vault.js";

/** @typedef {import("./conversations.js").Conversation} Conversation */
/** @typedef {import("./conversations.js").Message} Message */

const KEY = "locket.key";

class Page {
  /** @type {Conversation[]} */
  conversations = loadConversations();
  /** @type {Conversation} */
  current = this.conversations[0] ?? newConversation();
  /** The answer that comes in. @type {{conversation: Conversation, message: Message, controller: AbortController} | null} */
  running = null;
  /** Why conversations have no answer, by their id. @type {Map<string, ApiError>} */
  errors = new Map();

  model = byId("model", HTMLSelectElement);
  system = byId("system", HTMLTextAreaElement);
  key = byId("key", HTMLInputElement);
  title = byId("title", HTMLElement);
  list = byId("list", HTMLUListElement);
  announcer = new Announcer(byId("announcer", HTMLElement));
  drawers = new Drawers();
  settings = new Settings();
  /** Cards of the models by name. @type {Map<string, any>} */
  cards = new Map();
  composer = new Composer((text, pictures) => this.send(text, pictures), () => this.stop());
  transcript = new Transcript({
    regenerate: () => this.regenerate(),
    takeBack: () => this.takeBack(),
    goTo: (path) => this.goTo(path),
  });

  constructor() {
    this.key.value = readKey();
    this.live = new Live(() => this.key.value.trim(), () => this.cards.size === 0 && this.loadModels());
    this.listen();
    this.show();
    this.loadModels();
    this.composer.focus();
    sweep(thingsInUse);
  }

  listen() {
    byId("new", HTMLButtonElement).addEventListener("click", () => this.open(newConversation()));
    this.model.addEventListener("change", () => this.settings.configure(this.cards.get(this.model.value)));
    this.key.addEventListener("change", () => {
      writeKey(this.key.value.trim());
      this.loadModels();
      this.live.refresh();
    });
    byId("access", HTMLFormElement).addEventListener("submit", (event) => {
      event.preventDefault();
      this.key.blur();
      this.key.focus();
    });
    byId("settings", HTMLFormElement).addEventListener("submit", (event) => event.preventDefault());
    this.system.addEventListener("input", () => {
      this.current.system = this.system.value;
      if (this.current.messages.length > 0) this.save(this.current);
    });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.isComposing) return;
      if (this.drawers.close()) return;
      this.stop();
    });
    // What has come so far is kept if the page is left in the middle of an answer.
    addEventListener("pagehide", () => this.running && this.save(this.running.conversation));
    addEventListener("storage", (event) => concernsConversations(event) && this.takeFromOtherTabs());
  }

  /** @param {Conversation} conversation */
  open(conversation) {
    this.current = conversation;
    this.drawers.close();
    this.show();
    this.composer.focus();
  }

  show() {
    this.title.textContent = titleOf(this.current);
    document.title = this.current.messages.length === 0 ? "locket" : `${titleOf(this.current)} · locket`;
    this.system.value = this.current.system;
    this.transcript.show(this.current, {
      running: this.running?.conversation === this.current ? this.running.message : null,
      error: this.errors.get(this.current.id) ?? null,
      isBusy: this.running !== null,
    });
    this.composer.setBusy(this.running !== null);
    this.showList();
  }

  showList() {
    const items = this.conversations.map((conversation) => {
      const isCurrent = conversation === this.current;
      const title = titleOf(conversation);
      const open = element("button", { type: "button", class: "open", "aria-current": isCurrent ? "true" : null, click: () => this.open(conversation) }, title);
      const remove = element("button", { type: "button", class: "remove", "aria-label": `Delete ${title}`, click: () => this.remove(conversation) }, "×");
      return element("li", {}, open, remove);
    });
    const focused = document.activeElement;
    const index = focused ? Array.from(this.list.querySelectorAll("button")).indexOf(/** @type {any} */ (focused)) : -1;
    this.list.replaceChildren(...items);
    // The list may be made anew under the reader's hands.
    if (index >= 0) this.list.querySelectorAll("button")[index]?.focus();
  }

  /** @param {Conversation} conversation */
  save(conversation) {
    conversation.updated = Date.now();
    this.conversations = [conversation, ...this.conversations.filter((other) => other !== conversation)];
    if (!saveConversation(conversation)) this.composer.complain("The browser's storage is full or turned off: this conversation is not kept.");
  }

  takeFromOtherTabs() {
    if (this.running) return;
    this.conversations = loadConversations();
    const same = this.conversations.find((conversation) => conversation.id === this.current.id);
    if (same) this.current = same;
    else if (this.current.messages.length > 0) this.current = newConversation();
    this.show();
  }

  /** @param {Conversation} conversation */
  remove(conversation) {
    const dialog = byId("confirm", HTMLDialogElement);
    byId("confirm-text", HTMLElement).textContent = `Delete “${titleOf(conversation)}”?`;
    dialog.returnValue = "cancel";
    dialog.onclose = () => {
      if (dialog.returnValue !== "delete") return;
      if (this.running?.conversation === conversation) this.stop();
      this.conversations = this.conversations.filter((other) => other !== conversation);
      this.errors.delete(conversation.id);
      removeConversation(conversation);
      forget(thingsOf(conversation));
      this.announcer.say("Deleted");
      if (conversation === this.current) this.open(newConversation());
      else this.show();
    };
    dialog.showModal();
  }

  /**
   * @param {string} text
   * @param {import("./composer.js").Picture[]} pictures
   */
  send(text, pictures) {
    if (this.running || !this.settingsAreGood()) return false;
    const message = newMessage("user", text);
    if (pictures.length > 0) message.images = pictures.map(({ id }) => id);
    this.current.messages.push(message);
    const kept = Promise.all(pictures.map(({ id, blob }) => keep(id, blob)));
    this.save(this.current);
    this.answer(this.current, kept);
    return true;
  }

  /** Another answer in place of the last one. */
  regenerate() {
    if (this.running || !this.settingsAreGood()) return;
    const { messages } = this.current;
    const last = messages.at(-1);
    if (last?.role === "assistant") {
      messages.pop();
      if (last.visual) forget([last.visual]);
    }
    this.answer(this.current, Promise.resolve());
    this.composer.focus();
  }

  settingsAreGood() {
    const wrong = this.settings.firstFault();
    if (wrong) this.reveal(wrong);
    return wrong === null;
  }

  /** The last message, which has no answer, goes back into the field. */
  async takeBack() {
    const { messages } = this.current;
    if (this.running || messages.at(-1)?.role !== "user") return;
    const message = /** @type {Message} */ (messages.pop());
    this.errors.delete(this.current.id);
    this.save(this.current);
    if (messages.length === 0) {
      this.conversations = this.conversations.filter((other) => other !== this.current);
      removeConversation(this.current);
    }
    this.show();
    const pictures = [];
    for (const [index, id] of (message.images ?? []).entries()) {
      const blob = await find(id);
      if (blob instanceof Blob) pictures.push({ id, blob, name: blob instanceof File ? blob.name : `Image ${index + 1}` });
    }
    this.composer.fill(message.text, pictures);
  }

  /**
   * @param {Conversation} conversation whose last message is the reader's
   * @param {Promise<unknown>} ready when its images can be found
   */
  async answer(conversation, ready) {
    const message = newMessage("assistant", "");
    const controller = new AbortController();
    const running = { conversation, message, controller };
    this.running = running;
    this.errors.delete(conversation.id);
    const asked = [...conversation.messages];
    conversation.messages.push(message);
    this.announcer.begin();
    this.show();
    try {
      await ready;
      const body = await chatBody(this.model.value, conversation.system, asked, this.settings.requestFields(hasImages(asked)));
      await this.receive(body, running);
    } catch (error) {
      if (controller.signal.aborted) message.stopped = true;
      else this.errors.set(conversation.id, error instanceof ApiError ? error : new ApiError(`The page failed: ${error}`));
    }
    this.finish(running);
  }

  /**
   * @param {object} body
   * @param {{conversation: Conversation, message: Message, controller: AbortController}} running
   */
  async receive(body, running) {
    const { message, controller } = running;
    let reports = null;
    /** @type {{finish: string | null, usage: any, first: number, last: number}} */
    const facts = { finish: null, usage: null, first: 0, last: 0 };
    let frame = 0;
    const draw = () => {
      frame = 0;
      if (this.running !== running || this.current !== running.conversation) return;
      this.transcript.update(true);
      this.announcer.follow(message.text, false);
    };
    try {
      for await (const chunk of streamChat(body, this.key.value.trim(), controller.signal)) {
        const choice = chunk.choices?.[0];
        const content = choice?.delta?.content ?? "";
        const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content ?? "";
        if (content !== "" || thought !== "") {
          facts.last = performance.now();
          facts.first ||= facts.last;
        }
        message.text += content;
        if (thought !== "") message.reasoning = (message.reasoning ?? "") + thought;
        facts.finish = choice?.finish_reason ?? facts.finish;
        facts.usage = chunk.usage ?? facts.usage;
        reports = reportsIn(chunk) ?? reports;
        if (frame === 0) frame = requestAnimationFrame(draw);
      }
    } finally {
      cancelAnimationFrame(frame);
      message.note = noteOf(facts);
    }
    if (reports) {
      message.visual = randomId();
      await keep(message.visual, reports);
    }
  }

  /** @param {{conversation: Conversation, message: Message}} running */
  finish({ conversation, message }) {
    this.running = null;
    if (message.text === "" && !message.reasoning && (this.errors.has(conversation.id) || message.stopped)) {
      conversation.messages = conversation.messages.filter((other) => other !== message);
    }
    // It may have been deleted meanwhile.
    if (this.conversations.includes(conversation)) this.save(conversation);
    const error = this.errors.get(conversation.id);
    if (error?.param) this.settings.markRefused(error.param, error.message);
    if (!error) this.announcer.follow(message.text, true);
    if (message.stopped) this.announcer.say("Stopped");
    this.show();
    this.live.refresh();
  }

  stop() {
    this.running?.controller.abort();
  }

  /** @param {string} path */
  goTo(path) {
    const control = path === "key" ? this.key : path === "model" ? this.model : this.settings.control(path);
    if (control) this.reveal(control);
    return control !== null;
  }

  /** @param {HTMLElement} control */
  reveal(control) {
    this.drawers.openFor(control);
    const section = control.closest("details");
    if (section) section.open = true;
    control.focus();
    control.scrollIntoView({ block: "center" });
  }

  async loadModels() {
    const chosen = this.model.value;
    try {
      const cards = await listModels(this.key.value.trim());
      this.cards = new Map(cards.filter((card) => typeof card?.id === "string").map((card) => [card.id, card]));
      byId("version", HTMLElement).textContent = await readVersion(this.key.value.trim());
    } catch (error) {
      this.model.disabled = true;
      const needsKey = error instanceof ApiError && error.status === 401;
      this.model.replaceChildren(element("option", { value: "" }, needsKey ? "needs an API key" : "not reachable"));
      return;
    }
    this.model.replaceChildren(...[...this.cards.keys()].map((name) => element("option", { value: name }, name)));
    this.model.disabled = this.cards.size === 0;
    if (this.cards.has(chosen)) this.model.value = chosen;
    this.settings.configure(this.cards.get(this.model.value));
  }
}

function readKey() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

/** @param {string} key */
function writeKey(key) {
  try {
    if (key === "") sessionStorage.removeItem(KEY);
    else sessionStorage.setItem(KEY, key);
  } catch {
    // It holds until the page is left.
  }
}

listenForColours();
new Page();
