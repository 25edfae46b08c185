// Modules of the page by themselves, run inside of it, where the policy holds.

import assert from "node:assert/strict";

/** Events come out whole however the text is cut. */
export async function events(page) {
  const text = ": comment\ndata: one\n\ndata:two\r\ndata: lines\r\n\r\nevent: x\rid: 1\rdata\r\rdata: last\n\n";
  const found = await page.evaluate(async (text) => {
    const { EventParser } = await import("/assets/sse.js");
    const cuts = [];
    for (let size = 1; size <= text.length; size++) {
      const parser = new EventParser();
      const events = [];
      for (let at = 0; at < text.length; at += size) events.push(...parser.push(text.slice(at, at + size)));
      cuts.push(events);
    }
    return cuts;
  }, text);
  for (const events of found) assert.deepEqual(events, ["one", "two\nlines", "", "last"]);
}

/** `[text, HTML]`: what a browser shows for a Markdown text. */
const MARKDOWN = [
  ["a **b** *c* ~~d~~ `e`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e</code></p>"],
  ["***a** b*", "<p><em><strong>a</strong> b</em></p>"],
  ["snake_case_name 2 * 3 * 4 and **open", "<p>snake_case_name 2 * 3 * 4 and **open</p>"],
  ["\\*no\\* `` a`b ``", "<p>*no* <code>a`b</code></p>"],
  ["one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"],
  ["# A #\n### B", "<h3>A</h3><h4>B</h4>"],
  ["- a\n- b\n  1. c\n  2. d\n- e", "<ul><li>a</li><li>b<ol><li>c</li><li>d</li></ol></li><li>e</li></ul>"],
  ["3. a\n\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'],
  ["> a\n> > b", "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>"],
  ["a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"],
  ["[a](https://x.example/1)", '<p><span><a href="https://x.example/1" rel="noopener noreferrer nofollow" target="_blank" title="https://x.example/1">a</a> (x.example)</span></p>'],
  ["[a](javascript:alert(1)) [b](data:text/html,x)", "<p>[a](javascript:alert(1)) [b](data:text/html,x)</p>"],
  ["<b onclick=alert(1)>&lt;", "<p>&lt;b onclick=alert(1)&gt;&amp;lt;</p>"],
  ["", ""],
];

/** Markdown becomes these elements and no others. */
export async function markdown(page) {
  for (const [text, html] of MARKDOWN) {
    const shown = await page.evaluate(async (text) => {
      const { MarkdownView } = await import("/assets/markdown.js");
      const view = new MarkdownView(document.createElement("div"));
      // As it grows, and as a whole.
      for (let end = 0; end < text.length; end++) view.show(text.slice(0, end));
      view.show(text);
      return view.container.innerHTML;
    }, text);
    assert.equal(shown, html, text);
  }
}

/** Code and tables, which have buttons and labels around them. */
export async function blocks(page) {
  const text = "```rust\nlet a = \"<b>\";\n\n```\n\n| a | b |\n|---|:-:|\n| 1 | `2` | 3 |\n| \\| |\n\n~~~\nopen";
  const shown = await page.evaluate(async (text) => {
    const { MarkdownView } = await import("/assets/markdown.js");
    const view = new MarkdownView(document.createElement("div"));
    view.show(text);
    const texts = (/** @type {string} */ selector) => [...view.container.querySelectorAll(selector)].map((node) => node.textContent);
    return { code: texts("pre code"), languages: texts(".code-head span"), head: texts("th"), cells: texts("td") };
  }, text);
  assert.deepEqual(shown, {
    code: ['let a = "<b>";\n', "open"],
    languages: ["rust", ""],
    head: ["a", "b"],
    cells: ["1", "2", "|"],
  });
}

/** No text makes reading slow or deep: each of these is 200,000 characters. */
export async function hardTexts(page) {
  const milliseconds = await page.evaluate(async () => {
    const { MarkdownView } = await import("/assets/markdown.js");
    const starts = ["*", "_a", "[", "`", "**a ", "> ", "- ", "a|", "```\n", "![a](", "~~", "\\", "``` `` ` ", "https://", "1. ", "|-", "*a_b"];
    const slowest = { start: "", took: 0 };
    for (const start of starts) {
      const view = new MarkdownView(document.createElement("div"));
      const begin = performance.now();
      view.show(start.repeat(Math.ceil(200_000 / start.length)));
      const took = performance.now() - begin;
      if (took > slowest.took) Object.assign(slowest, { start, took });
    }
    return slowest;
  });
  // A quadratic reader takes minutes.
  assert.ok(milliseconds.took < 20_000, JSON.stringify(milliseconds));
}

/** The text format of Prometheus. */
export async function metrics(page) {
  const text = '# HELP a b\na 1\nb{x="1",y="q\\"\\n,}"} 2.5\nb{x="2",y=""} 3e2\nc +Inf\nnonsense\n';
  const found = await page.evaluate(async (text) => {
    const { parseMetrics, sum } = await import("/assets/metrics_text.js");
    const families = parseMetrics(text);
    const labels = families.get("b")[0].labels.y;
    return [sum(families, "a"), sum(families, "b"), sum(families, "b", { x: "2" }), sum(families, "d"), sum(families, "c") === Infinity, labels];
  }, text);
  assert.deepEqual(found, [1, 302.5, 300, null, true, 'q"\n,}']);
}
