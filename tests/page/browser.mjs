// A browser that talks to the server under test and to nobody else.

import assert from "node:assert/strict";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { chromium } from "playwright-core";

export const SERVER = process.env.SERVER;
export const GUARDED_SERVER = process.env.GUARDED_SERVER;
const SCREENSHOTS = process.env.LOCKET_PAGE_SCREENSHOTS;

const FLAGS = [
  "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
];

let browser;

export async function start() {
  browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", headless: true, args: FLAGS });
}

export async function stop() {
  await browser?.close();
}

/**
 * Runs `work` with a new page in a profile of its own. Afterwards nothing must have asked another origin,
 * broken the policy, or thrown.
 */
export async function withPage(work, { url = SERVER, faults = [], ...options } = {}) {
  const context = await browser.newContext({ viewport: { width: 1360, height: 860 }, colorScheme: "light", ...options });
  context.setDefaultTimeout(60_000);
  const page = await context.newPage();
  const wrong = [];
  const isOurs = (address) => address.startsWith(`${url}/`) || address.startsWith("blob:") || address === "about:blank";
  context.on("request", (request) => isOurs(request.url()) || wrong.push(`a request to ${request.url()}`));
  page.on("pageerror", (error) => wrong.push(`an exception: ${error}`));
  page.on("dialog", (dialog) => {
    wrong.push(`a dialog: ${dialog.message()}`);
    dialog.dismiss();
  });
  page.on("console", (message) => {
    if (message.type() !== "error" || faults.some((fault) => message.text().includes(fault))) return;
    wrong.push(`on the console: ${message.text()}`);
  });
  try {
    await page.goto(`${url}/`);
    await work(page, context);
    assert.deepEqual(wrong, []);
  } finally {
    await context.close();
  }
}

/** Keeps a picture for people, if asked to. */
export async function picture(page, name) {
  if (SCREENSHOTS) await page.screenshot({ path: join(SCREENSHOTS, `${name}.png`) });
}

/** A folder that is gone afterwards. */
export function temporaryFolder(context) {
  const folder = mkdtempSync(join(tmpdir(), "locket-page-"));
  context.after(() => rmSync(folder, { recursive: true }));
  return folder;
}

/** Sends a message with the keyboard. */
export async function say(page, text) {
  await page.locator("#message").fill(text);
  await page.keyboard.press("Enter");
}

/** Waits until no answer comes in. */
export async function answered(page) {
  await page.locator("#send", { hasText: "Send" }).waitFor();
}

/** The body of a stream with these chunks. */
export function eventStream(chunks) {
  const events = [...chunks.map((chunk) => JSON.stringify(chunk)), "[DONE]"];
  return { contentType: "text/event-stream", body: events.map((data) => `data: ${data}\n\n`).join("") };
}

/** A chunk with text. */
export function delta(content) {
  return { choices: [{ index: 0, delta: { content }, finish_reason: null }] };
}

/** A PNG of 64 by 48 pixels. */
export const PNG = Buffer.from(
  "iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetIAAAAk0lEQVR42u3YsQ2AMBBDUY/DEMxEzUxMwlgUSHQREjlw7viSB/ArIuWsedlSRwAAAAAAAACAVvZ1OpMJcJVuZVzAbfU3GLK0DzTI1T7KIGP7EIO87fsNsrfvNPwYENi+xwAAgAcQ3v6xAUBSAI8YAAA+cyMA0t8DFS6yCjdxhVWiwi5UYZkrso0yrwMAAAAAgA9zAGW2IXWJNxTRAAAAAElFTkSuQmCC",
  "base64",
);
