// What the page does, in a real browser against the real server.

import assert from "node:assert/strict";
import { readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { join } from "node:path";
import { after, before, test } from "node:test";
import { GUARDED_SERVER, PNG, SERVER, answered, delta, eventStream, picture, say, start, stop, temporaryFolder, withPage } from "./browser.mjs";
import * as modules from "./modules.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");

before(start);
after(stop);

test("modules", async (context) => {
  for (const [name, check] of Object.entries(modules)) await context.test(name, () => withPage(check));
});

test("an answer streams, costs are told, and the conversation is kept", () =>
  withPage(async (page) => {
    await page.evaluate(() => {
      window.lengths = new Set();
      const note = () => window.lengths.add(document.querySelector(".assistant .body")?.textContent.length);
      new MutationObserver(note).observe(document.getElementById("transcript"), { subtree: true, childList: true, characterData: true });
    });
    await say(page, "Tell me about the sea.");
    await answered(page);
    const lengths = await page.evaluate(() => window.lengths.size);
    assert.ok(lengths > 5, `the text had ${lengths} lengths`);
    const text = await page.locator(".assistant .body").innerText();
    assert.match(await page.locator(".assistant > .note").innerText(), /^(cut at the token limit · )?\d+ \+ \d+ tokens · \d+ tokens\/s.* · exact$/);
    assert.equal(await page.title(), "Tell me about the sea. · locket");
    await page.reload();
    assert.equal(await page.locator(".assistant .body").innerText(), text);

    await page.getByRole("button", { name: "Regenerate" }).click();
    await answered(page);
    assert.equal(await page.locator("article").count(), 2);

    // A second one beside it, and back.
    await page.getByRole("button", { name: "New conversation" }).click();
    assert.equal(await page.locator("article").count(), 0);
    await say(page, "Hello.");
    await answered(page);
    assert.equal(await page.locator("#list li").count(), 2);
    await page.getByRole("button", { name: "Tell me about the sea.", exact: true }).click();
    assert.equal(await page.locator(".user").innerText(), "Tell me about the sea.");
    await page.getByRole("button", { name: "Delete Hello." }).click();
    await page.getByRole("button", { name: "Keep" }).click();
    assert.equal(await page.locator("#list li").count(), 2);
    await page.getByRole("button", { name: "Delete Hello." }).click();
    await page.getByRole("dialog").getByRole("button", { name: "Delete" }).click();
    await page.locator("#list li").nth(1).waitFor({ state: "detached" });
    assert.equal(await page.evaluate(() => Object.keys(localStorage).length), 1);
  }));

test("settings are sent, and only those that are set", () =>
  withPage(async (page) => {
    const bodies = [];
    await page.route("**/v1/chat/completions", (route) => {
      bodies.push(route.request().postDataJSON());
      return route.fulfill(eventStream([delta("ok")]));
    });
    await page.locator("#model option[value=smollm2]").waitFor({ state: "attached" });
    await say(page, "Hi");
    await answered(page);
    await page.getByLabel("System prompt of this conversation").fill("Be brief.");
    await page.getByLabel("Temperature").fill("0.3");
    await page.getByLabel("Seed").fill("7");
    await page.getByLabel("Cache method").selectOption("window");
    await page.getByLabel("Slots").fill("64");
    await page.getByLabel("Only exact").selectOption("no");
    await say(page, "Again");
    await answered(page);
    const streamed = { model: "smollm2", stream: true, stream_options: { include_usage: true } };
    const first = [{ role: "user", content: "Hi" }];
    assert.deepEqual(bodies[0], { ...streamed, messages: first });
    assert.deepEqual(bodies[1], {
      ...streamed,
      messages: [{ role: "system", content: "Be brief." }, ...first, { role: "assistant", content: "ok" }, { role: "user", content: "Again" }],
      temperature: 0.3,
      seed: 7,
      locket: { kv_cache: { method: "window", slots: 64 }, require_exact: false },
    });
    await page.reload();
    await page.locator("#model option[value=smollm2]").waitFor({ state: "attached" });
    assert.equal(await page.getByLabel("Temperature").inputValue(), "0.3");
    assert.equal(await page.getByLabel("Cache method").inputValue(), "window");

    // Values beyond the limits of /v1/models are marked and not sent.
    await page.getByLabel("Slots").fill("15");
    await say(page, "Wrong");
    assert.equal(await page.evaluate(() => document.activeElement.id), "field-locket-kv_cache-slots");
    assert.equal(await page.getByLabel("Slots").getAttribute("aria-invalid"), "true");
    assert.equal(await page.locator("#message").inputValue(), "Wrong");
    assert.equal(bodies.length, 2);
    await page.getByRole("button", { name: "Back to the server's defaults" }).click();
    await page.locator("#message").press("Enter");
    await answered(page);
    assert.deepEqual(Object.keys(bodies[2]).sort(), ["messages", "model", "stream", "stream_options"]);
  }));

test("errors of the contract come with their field", () =>
  withPage(
    async (page) => {
      await page.getByLabel("Cache method").selectOption("full");
      await page.getByLabel("Slots").fill("64");
      await say(page, "Hi");
      const card = page.getByRole("alert").filter({ hasText: "the method full has none" });
      await card.waitFor();
      const facts = await card.locator(".facts").innerText();
      for (const part of ["locket.kv_cache.slots", "invalid_value", "400", "req_"]) assert.ok(facts.includes(part), facts);
      assert.equal(await page.getByLabel("Slots").getAttribute("aria-invalid"), "true");
      await card.getByRole("button", { name: "Go to the setting" }).click();
      assert.equal(await page.evaluate(() => document.activeElement.id), "field-locket-kv_cache-slots");
      await picture(page, "error");
      await page.getByLabel("Slots").fill("");
      await card.getByRole("button", { name: "Try again" }).click();
      await answered(page);
      assert.equal(await page.locator(".assistant").count(), 1);

      // An error inside a stream, and one that ends without a word.
      await page.route("**/v1/chat/completions", (route) =>
        route.fulfill(eventStream([delta("Some"), { error: { message: "It broke.", type: "server_error", param: null, code: "internal_error" } }])));
      await say(page, "More");
      await page.getByRole("alert").filter({ hasText: "It broke." }).waitFor();
      assert.equal(await page.locator(".assistant .body").last().innerText(), "Some");
      await page.unroute("**/v1/chat/completions");
      await page.route("**/v1/chat/completions", (route) => route.fulfill({ contentType: "text/event-stream", body: "data: {\"choices\":[]}\n\n" }));
      await page.getByRole("button", { name: "Try again" }).click();
      await page.getByRole("alert").filter({ hasText: "broke off before its end" }).waitFor();
    },
    { faults: ["400 (Bad Request)"] },
  ));

test("everything works with the keyboard alone", () =>
  withPage(async (page) => {
    const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.textContent.trim());
    const tabTo = async (name) => {
      for (let presses = 0; presses < 60; presses++) {
        if ((await focused()) === name) return;
        await page.keyboard.press("Tab");
      }
      assert.fail(`no ${name} by Tab`);
    };
    await page.locator("#model option[value=smollm2]").waitFor({ state: "attached" });
    assert.equal(await focused(), "message");
    // As after a click beside everything.
    await page.evaluate(() => {
      document.body.tabIndex = -1;
      document.body.focus();
      document.body.removeAttribute("tabindex");
    });
    await page.keyboard.press("Tab");
    assert.equal(await focused(), "Skip to the message field");
    assert.ok((await page.locator(".skip").boundingBox()).y >= 0, "the link is seen while it has the focus");
    await page.keyboard.press("Enter");
    assert.equal(await focused(), "message");
    // A greedy answer that does not end by itself soon.
    await tabTo("field-temperature");
    await page.keyboard.type("0");
    await tabTo("field-max_tokens");
    await page.keyboard.type("3000");
    for (let presses = 0; presses < 60 && (await focused()) !== "message"; presses++) await page.keyboard.press("Shift+Tab");
    await page.keyboard.type("Count from 1 to 1000, one number");
    await page.keyboard.press("Shift+Enter");
    await page.keyboard.type("per line.");
    await page.keyboard.press("Enter");
    await page.locator(".assistant .body", { hasText: /\w/ }).waitFor();
    assert.equal(await focused(), "message", "the focus stays");
    assert.equal(await page.locator("#send").innerText(), "Stop");
    await page.keyboard.press("Escape");
    await answered(page);
    assert.match(await page.locator(".assistant > .note").innerText(), /^Stopped/);
    assert.equal(await page.locator(".user").innerText(), "Count from 1 to 1000, one number\nper line.");
    await tabTo("Regenerate");
    // The transcript can be scrolled, and its buttons come behind it.
    for (let presses = 0; presses < 5 && (await focused()) !== "transcript"; presses++) await page.keyboard.press("Shift+Tab");
    assert.equal(await focused(), "transcript");
    await page.evaluate(() => document.querySelector("#new").focus());
    await page.keyboard.press("Enter");
    assert.equal(await focused(), "message");
    assert.equal(await page.locator("article").count(), 0);
    // Every control has a ring when it has the focus.
    await page.keyboard.press("Tab");
    const ring = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(ring, "solid");
  }));

const HOSTILE = [
  "<img src=x onerror=\"window.hacked=1\"><script>window.hacked=2</script>",
  "<svg onload=window.hacked=3> <iframe src=\"javascript:window.hacked=4\"></iframe>",
  "[click](javascript:window.hacked=5) ![i](https://evil.example/x.png) [y](//evil.example)",
  "```html\n<script>window.hacked=6</script>\n</code></pre><script>window.hacked=7</script>\n```",
  "| <b>x</b> |\n|---|\n| <img src=y onerror=window.hacked=8> |",
  "<style>*{display:none}</style><base href=https://evil.example/><meta http-equiv=refresh content=0>",
  "</textarea></div></article><form action=https://evil.example><button>x</button></form>",
].join("\n\n");

test("what a model says never becomes HTML", () =>
  withPage(
    async (page) => {
      const isHarmless = async () => {
        const inside = page.locator("#transcript");
        for (const tag of ["img", "script", "svg", "iframe", "style", "base", "meta", "form", "b"]) {
          assert.equal(await inside.locator(tag).count(), 0, tag);
        }
        const text = await inside.innerText();
        for (const part of ["<img src=x", "window.hacked=2</script>", "<svg onload", "javascript:window.hacked=5", "</code></pre>", "onerror=window.hacked=8", "<style>*", "<form action"]) {
          assert.ok(text.includes(part), part);
        }
        const links = await inside.locator("a").evaluateAll((links) => links.map((link) => link.protocol));
        assert.ok(links.every((protocol) => protocol === "https:"), String(links));
        assert.equal(await page.evaluate(() => window.hacked), undefined);
      };
      // As an answer.
      await page.route("**/v1/chat/completions", (route) => route.fulfill(eventStream([...HOSTILE].map(delta))));
      await say(page, HOSTILE);
      await answered(page);
      await isHarmless();
      // As what is stored, which others may have written.
      await page.evaluate((text) => {
        const message = (role) => ({ role, id: text, text, reasoning: text, note: text, images: [text], visual: text });
        const conversation = { id: text, updated: 9e15, system: text, messages: [message("user"), message("assistant"), null, { role: text, text }] };
        localStorage.setItem(`locket.conversation.${text}`, JSON.stringify(conversation));
        localStorage.setItem("locket.conversation.bad", "{");
        localStorage.setItem("locket.settings", `{"temperature": 7, "seed": ${JSON.stringify(text)}}`);
      }, HOSTILE);
      await page.reload();
      await page.locator(".thoughts").waitFor();
      await isHarmless();
      await page.unroute("**/v1/chat/completions");
      // As an error.
      await page.route("**/v1/chat/completions", (route) =>
        route.fulfill({ status: 400, contentType: "application/json", body: JSON.stringify({ error: { message: HOSTILE, param: HOSTILE, code: HOSTILE } }) }));
      await page.getByRole("button", { name: "New conversation" }).click();
      await say(page, HOSTILE);
      await page.getByRole("alert").filter({ hasText: "window.hacked" }).waitFor();
      await isHarmless();
    },
    { faults: ["400 (Bad Request)"] },
  ));

test("the policy refuses what the page never does", () =>
  withPage(
    async (page) => {
      const refused = await page.evaluate(async () => {
        const tried = {};
        const attempt = async (name, work) => {
          tried[name] = await Promise.resolve().then(work).then(() => "done", () => "refused");
        };
        await attempt("HTML from text", () => (document.body.innerHTML = "<p>x"));
        await attempt("a policy of trusted types", () => trustedTypes.createPolicy("default", { createHTML: (text) => text }));
        await attempt("another origin", () => fetch("http://127.0.0.1:9/"));
        const script = document.createElement("script");
        await attempt("a script of text", () => (script.textContent = "window.hacked = 1"));
        return { ...tried, hacked: window.hacked ?? null };
      });
      assert.deepEqual(refused, {
        "HTML from text": "refused",
        "a policy of trusted types": "refused",
        "another origin": "refused",
        "a script of text": "refused",
        hacked: null,
      });
    },
    { faults: ["Content Security Policy", "TrustedHTML", "TrustedScript", "trusted"] },
  ));

test("images are shown before they are sent, and a model of text refuses them in words", (context) =>
  withPage(
    async (page) => {
      const folder = temporaryFolder(context);
      const files = ["one.png", "two.png"].map((name) => join(folder, name));
      for (const file of files) writeFileSync(file, PNG);
      const previews = page.locator("#previews img");
      await page.locator("#files").setInputFiles(files);
      assert.equal(await previews.count(), 2);
      // By drop and by paste: what the browser makes of a hand's or the clipboard's files.
      for (const kind of ["drop", "paste"]) {
        await page.evaluate(
          async ([kind, bytes]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], `${kind}.png`, { type: "image/png" }));
            const target = document.querySelector("#message");
            if (kind === "paste") {
              target.dispatchEvent(new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true, cancelable: true }));
              return;
            }
            target.dispatchEvent(new DragEvent("dragover", { dataTransfer: transfer, bubbles: true, cancelable: true }));
            if (document.querySelector("#drop").hidden) throw new Error("the place to drop is not shown");
            target.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
          },
          [kind, [...PNG]],
        );
      }
      assert.deepEqual(await previews.evaluateAll((images) => images.map((image) => image.alt)), ["one.png", "two.png", "drop.png", "paste.png"]);
      for (const image of await previews.all()) await image.evaluate((image) => image.decode());
      assert.ok(await page.locator("#drop").isHidden());
      for (const name of ["one.png", "paste.png"]) {
        await page.getByRole("button", { name: `Remove ${name}` }).focus();
        await page.keyboard.press("Enter");
      }
      assert.equal(await previews.count(), 2);
      await page.locator("#files").setInputFiles({ name: "a.pdf", mimeType: "application/pdf", buffer: Buffer.from("x") });
      assert.match(await page.locator("#composer-problem").innerText(), /Not an image that can be sent .*: a\.pdf$/);
      await picture(page, "previews");

      const sent = page.waitForRequest("**/v1/chat/completions");
      await say(page, "What is it?");
      const { content } = (await sent).postDataJSON().messages[0];
      assert.deepEqual(content.map((part) => part.type), ["image_url", "image_url", "text"]);
      assert.equal(content[0].image_url.url, `data:image/png;base64,${PNG.toString("base64")}`);
      const card = page.getByRole("alert").filter({ hasText: "this model takes text only" });
      await card.waitFor();
      assert.match(await card.locator(".facts").innerText(), /messages\[0\]\.content\[0\]/);
      assert.equal(await page.locator(".user img").count(), 2);
      await page.reload();
      await page.locator(".user img").nth(1).waitFor();
      await page.getByRole("button", { name: "Take back" }).click();
      await previews.nth(1).waitFor();
      assert.equal(await page.locator("#message").inputValue(), "What is it?");
      assert.equal(await previews.count(), 2);
      assert.equal(await page.locator("article").count(), 0);
    },
    { faults: ["400 (Bad Request)"] },
  ));

/** What a server with a vision model says, in the form of docs/api.md. */
const REPORT = {
  path: "messages[0].content[0].image_url.url", width: 64, height: 48, detail: "auto", method: "hired", tokens: 1176, kept: 7, was_cached: false, newlines: 1,
  base: { rows: 24, columns: 24, kept: [[0, 0], [12, 12]], boxes: [[0, 0, 2.7, 2], [32, 24, 2.7, 2]] },
  map: { rows: 24, columns: 24, kept: [[0, 1], [1, 1], [2, 2], [5, 5]], boxes: [[2.7, 0, 2.7, 2], [2.7, 2, 2.7, 2], [5.3, 4, 2.7, 2], [13.3, 10, 2.7, 2]] },
  stages: [{ layer: 8, kept: 4 }],
};

test("an overlay shows which patches the budget kept", () =>
  withPage(async (page, context) => {
    await context.route("**/v1/models", async (route) => {
      const response = await route.fetch();
      const models = await response.json();
      models.data[0].locket.visual = { method: "hired", methods: ["none", "hired", "pyramid"], budget: 0.4, max_budget: 1, max_images: 16, max_tokens: 2928 };
      await route.fulfill({ response, json: models });
    });
    const bodies = [];
    await context.route("**/v1/chat/completions", (route) => {
      bodies.push(route.request().postDataJSON());
      const details = { cached_tokens: 0, image_tokens: 1176, image_tokens_kept: 7 };
      const usage = { prompt_tokens: 1206, completion_tokens: 2, prompt_tokens_details: details, locket: { exact: true, folded_tokens: 0, method: "full", visual: [REPORT] } };
      return route.fulfill(eventStream([delta("A disc."), { choices: [], usage }]));
    });
    await page.reload();
    await page.getByLabel("Dropping method").selectOption("pyramid");
    await page.getByLabel("Share, or tokens").fill("0.2");
    await page.locator("#files").setInputFiles({ name: "a.png", mimeType: "image/png", buffer: PNG });
    await say(page, "What is it?");
    await page.locator("svg.veil").first().waitFor({ state: "attached" });
    assert.deepEqual(bodies[0].locket, { visual: { report: true, method: "pyramid", budget: 0.2 } });
    assert.equal(await page.locator(".assistant > .note").innerText(), "1206 + 2 tokens · 7 of 1176 visual tokens · exact");
    const shown = () => page.locator("svg.veil:not(.off) path.kept").evaluateAll((paths) => paths.map((path) => (path.getAttribute("d").match(/M/g) ?? []).length));
    assert.deepEqual(await shown(), [4], "the parts are shown first");
    assert.equal(await page.locator("figcaption").getByText("7 of 1,176 visual tokens (1 %), hired, 4 from layer 8 on").count(), 1);
    const whole = page.getByRole("button", { name: "Kept of the whole" });
    await whole.click();
    assert.deepEqual(await shown(), [2]);
    // The veil lies on the image, and a unit of it is a pixel of the image.
    const veil = page.locator("svg.veil:not(.off)");
    assert.deepEqual(await veil.boundingBox(), await page.locator(".user img").boundingBox());
    assert.equal(await veil.getAttribute("viewBox"), "0 0 64 48");
    assert.equal(await veil.locator("path.kept").getAttribute("d"), "M0 0h2.7v2h-2.7zM32 24h2.7v2h-2.7z");
    await picture(page, "overlay");
    await whole.click();
    assert.deepEqual(await shown(), []);
    await page.reload();
    await page.locator("svg.veil").first().waitFor({ state: "attached" });
    assert.deepEqual(await shown(), [4], "it is kept");
  }));

test("the live view has the figures of the metrics", () =>
  withPage(async (page) => {
    await say(page, "Hi");
    await answered(page);
    await page.locator("#state", { hasText: "idle" }).waitFor();
    const { shown, text } = await page.evaluate(async () => {
      const { parseMetrics, sum } = await import("/assets/metrics_text.js");
      const families = parseMetrics(await (await fetch("/metrics")).text());
      const number = (value) => value.toLocaleString("en");
      const blocks = (families.get("locket_blocks") ?? []).map(({ labels, value }) => `${labels.class} ${labels.state} ${value}`);
      const text = {
        Running: number(sum(families, "vllm:num_requests_running")),
        Waiting: number(sum(families, "vllm:num_requests_waiting")),
        "Folded tokens": number(sum(families, "locket_folded_tokens_total")),
        blocks: blocks.length / 2,
        total: sum(families, "locket_memory_bytes"),
      };
      const shown = Object.fromEntries([...document.querySelectorAll(".figures > div")].map((div) => [div.querySelector("dt").textContent, div.querySelector("dd").textContent]));
      shown.blocks = document.querySelectorAll(".blocks li").length;
      shown.memory = document.querySelector("#memory-title").textContent;
      return { shown, text };
    });
    assert.deepEqual([shown.Running, shown.Waiting, shown["Folded tokens"]], [text.Running, text.Waiting, text["Folded tokens"]]);
    assert.equal(shown.blocks, text.blocks);
    assert.equal(shown.memory, `Memory planned: ${Math.round(text.total / 2 ** 20)} MiB`);
  }));

test("a server with keys is told the reader's, which lasts as long as the tab", () =>
  withPage(
    async (page, context) => {
      await page.locator("#state", { hasText: "needs a key" }).waitFor();
      await page.locator("#model option", { hasText: "needs an API key" }).waitFor({ state: "attached" });
      await say(page, "Hi");
      await page.getByRole("button", { name: "Enter a key" }).click();
      assert.equal(await page.evaluate(() => document.activeElement.id), "key");
      await page.keyboard.type("sk-page");
      await page.keyboard.press("Enter");
      await page.locator("#model option[value=smollm2]").waitFor({ state: "attached" });
      await page.locator("#state", { hasText: "idle" }).waitFor();
      await page.getByRole("button", { name: "Try again" }).click();
      await answered(page);
      assert.equal(await page.locator(".assistant").count(), 1);
      await page.reload();
      assert.equal(await page.locator("#key").inputValue(), "sk-page");
      assert.ok(!(await page.evaluate(() => JSON.stringify(localStorage))).includes("sk-page"));
      const other = await context.newPage();
      await other.goto(`${GUARDED_SERVER}/`);
      assert.equal(await other.locator("#key").inputValue(), "");
    },
    { url: GUARDED_SERVER, faults: ["401 (Unauthorized)"] },
  ));

test("a server that was away is found again", () =>
  withPage(
    async (page, context) => {
      for (const path of ["**/v1/models", "**/metrics"]) await context.route(path, (route) => route.abort());
      await page.reload();
      await page.locator("#state", { hasText: "unreachable" }).waitFor();
      await page.locator("#model option", { hasText: "not reachable" }).waitFor({ state: "attached" });
      for (const path of ["**/v1/models", "**/metrics"]) await context.unroute(path);
      await page.locator("#model option[value=smollm2]").waitFor({ state: "attached" });
      await page.locator(".figures").waitFor();
    },
    { faults: ["net::ERR_FAILED"] },
  ));

test("a conversation that cannot be kept is not lost in silence", () =>
  withPage(async (page) => {
    await page.evaluate(() => {
      Storage.prototype.setItem = () => {
        throw new DOMException("full", "QuotaExceededError");
      };
    });
    await say(page, "Hi");
    await answered(page);
    assert.match(await page.locator("#composer-problem").innerText(), /this conversation is not kept/);
    assert.equal(await page.locator(".assistant").count(), 1);
  }));

test("colours follow the system or the reader", () =>
  withPage(async (page) => {
    const ground = () => page.evaluate(() => getComputedStyle(document.body).backgroundColor);
    const light = await ground();
    await page.emulateMedia({ colorScheme: "dark" });
    const dark = await ground();
    assert.notEqual(light, dark);
    await page.getByRole("radio", { name: "Light" }).check();
    assert.equal(await ground(), light);
    await page.reload();
    assert.equal(await ground(), light);
    await page.getByRole("radio", { name: "System" }).check();
    assert.equal(await ground(), dark);
    await page.emulateMedia({ colorScheme: "light" });
    await page.getByRole("radio", { name: "Dark" }).check();
    assert.equal(await ground(), dark);
  }));

test("on a phone the side columns are drawers", () =>
  withPage(
    async (page) => {
      const fits = () => page.evaluate(() => document.documentElement.scrollWidth <= innerWidth && document.querySelector("#transcript").scrollWidth <= innerWidth);
      assert.ok(await fits());
      assert.equal(await page.evaluate(() => document.querySelector("#panel").inert && document.querySelector("#conversations").inert), true);
      const settings = page.getByRole("button", { name: "Settings" });
      await settings.focus();
      await page.keyboard.press("Enter");
      assert.equal(await settings.getAttribute("aria-expanded"), "true");
      assert.ok(await page.evaluate(() => document.querySelector("#panel").contains(document.activeElement)));
      await picture(page, "phone-settings");
      await page.keyboard.press("Escape");
      assert.equal(await page.evaluate(() => document.activeElement.id), "show-panel");
      await page.route("**/v1/chat/completions", (route) => route.fulfill(eventStream([delta(`\`\`\`\n${"wide ".repeat(80)}\n\`\`\`\n\n${"long".repeat(80)}\n\n| a | b |\n|---|---|\n| ${"cell".repeat(60)} | x |`)])));
      await say(page, "Show me something wide.");
      await answered(page);
      assert.ok(await fits());
      await picture(page, "phone");
    },
    { viewport: { width: 390, height: 780 }, colorScheme: "dark" },
  ));

test("screen readers are told sentences while an answer comes", () =>
  withPage(async (page) => {
    await page.evaluate(() => {
      window.said = [];
      const region = document.querySelector("#announcer");
      new MutationObserver(() => window.said.push(region.textContent)).observe(region, { childList: true, characterData: true, subtree: true });
    });
    await page.route("**/v1/chat/completions", (route) => route.fulfill(eventStream([delta("One **two**. Three"), delta(" four.")])));
    await say(page, "Hi");
    await answered(page);
    const said = (await page.evaluate(() => window.said)).filter((text) => text !== "");
    assert.equal(said[0], "Answering");
    assert.equal(said.slice(1).join(" ").replace(/\s+/g, " "), "One two . Three four.");
    assert.equal(await page.locator("#announcer").getAttribute("aria-live"), "polite");
  }));

test("axe-core finds nothing", async (context) => {
  const CONVERSATION = {
    id: "0123456789abcdef", updated: 1, system: "", messages: [
      { role: "user", id: "a", text: "Show me **everything**." },
      { role: "assistant", id: "b", text: "# A\n\nText with `code`, a [link](https://a.example/) and https://b.example.\n\n- one\n- two\n\n```js\nlet a;\n```\n\n| a |\n|---|\n| 1 |\n\n> quote", reasoning: "Hm.", note: "1 + 2 tokens" },
      { role: "user", id: "c", text: "And?" },
    ],
  };
  const check = async (page, name) => {
    await page.evaluate(AXE);
    const { violations, passes } = await page.evaluate(() => window.axe.run(document, { resultTypes: ["violations"] }));
    const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html} ${node.failureSummary}`).join("; ")}`);
    assert.deepEqual(found, [], name);
    assert.ok(passes.length > 20, `${passes.length} rules passed`);
  };
  for (const colorScheme of ["light", "dark"]) {
    for (const [size, viewport] of [["wide", { width: 1360, height: 900 }], ["phone", { width: 390, height: 780 }]]) {
      await context.test(`${colorScheme}, ${size}`, () =>
        withPage(
          async (page) => {
            await page.locator(".figures").waitFor({ state: "attached" });
            await check(page, "empty");
            await page.evaluate((conversation) => localStorage.setItem(`locket.conversation.${conversation.id}`, JSON.stringify(conversation)), CONVERSATION);
            await page.reload();
            await page.locator(".figures").waitFor({ state: "attached" });
            await page.locator("#files").setInputFiles({ name: "a.png", mimeType: "image/png", buffer: PNG });
            await check(page, "a conversation");
            await say(page, "Look");
            await page.getByRole("alert").filter({ hasText: "text only" }).waitFor();
            await check(page, "an error");
            await picture(page, `${colorScheme}-${size}`);
            if (size === "phone") {
              await page.getByRole("button", { name: "Settings" }).click();
              await check(page, "a drawer");
            }
          },
          { colorScheme, viewport, faults: ["400 (Bad Request)"] },
        ));
    }
  }
});

test("without JavaScript the page says so", () =>
  withPage(
    async (page) => {
      assert.match(await page.locator("body").innerText(), /This page needs JavaScript/);
      assert.equal(SERVER, new URL(page.url()).origin);
    },
    { javaScriptEnabled: false },
  ));
