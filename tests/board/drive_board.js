// Drives a board in Chromium, and prints what it sees as JSON: node drive_board.js BROWSER URL SETTINGS PICTURE
const { readFileSync } = require("fs");
const { createRequire } = require("module");
const here = createRequire(process.cwd() + "/");
const { chromium } = here("playwright-core");
const axe = readFileSync(here.resolve("axe-core/axe.min.js"), "utf8");

async function drive(browser, url, settings, picture) {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 }, locale: "en" });
  page.setDefaultTimeout(180000);
  const found = { said: [], asked: [] };
  page.on("console", (message) => found.said.push(message.text()));
  page.on("pageerror", (error) => found.said.push(error.message));
  page.on("request", (asked) => { if (!asked.url().startsWith(url) && !asked.url().startsWith("data:")) found.asked.push(asked.url()); });

  await page.goto(url + "/new");
  for (const [key, value] of Object.entries(settings)) {
    const field = page.locator(`[name=${key}]`);
    await field.evaluate((of) => { const details = of.closest("details"); if (details) details.open = true; });
    await ((await field.evaluate((of) => of.tagName)) === "SELECT" ? field.selectOption(value) : field.fill(value));
  }
  await page.getByRole("button", { name: "Show the YAML and the command" }).click();
  found.written = await page.locator("pre").allTextContents();
  await page.getByRole("button", { name: "Start", exact: true }).click();
  const state = (name) => page.locator(`.state.${name}`).waitFor();
  const step = async () => parseInt(await page.locator(".facts dd").first().textContent(), 10);
  const past = (number) => page.waitForFunction((of) => parseInt(document.querySelector(".facts dd")?.textContent, 10) > of, number);
  await state("running");
  await past(0);  // the page is never loaded again here: what runs comes by itself
  found.curves = await page.locator("figure.curves").count();
  await page.getByRole("button", { name: "Stop" }).click();
  await state("stopped");
  found.stopped = await step();
  await page.getByRole("button", { name: "Go on" }).click();
  await state("running");
  await past(found.stopped);
  await page.getByRole("button", { name: "Stop" }).click();
  await state("stopped");
  found.later = await step();

  await page.goto(url + "/");
  await page.getByRole("link", { name: "Answers" }).click();
  for (const name of ["first/predictions-eval.jsonl", "../compare-eval/base.jsonl"]) await page.locator(`[value="${name}"]`).check();
  await page.getByRole("button", { name: "The chosen side by side" }).click();
  await page.getByRole("link", { name: /^wrong/ }).click();
  await page.waitForURL(/kind=wrong/);
  await page.keyboard.press("/");
  await page.keyboard.type("question 1");
  await page.keyboard.press("Enter");
  await page.waitForURL(/search=question/);
  found.wrong = await page.locator("article").allInnerTexts();
  await page.goto(url + "/questions?file=first/predictions-eval.jsonl");
  await page.keyboard.press("j");
  found.focused = await page.evaluate(() => document.activeElement.tagName);
  const shown = page.locator("article img").last();
  await shown.scrollIntoViewIfNeeded();
  found.picture = await shown.evaluate((image) => image.decode().then(() => image.naturalWidth));

  await page.goto(url + "/try");
  await page.locator("[name=run]").selectOption("driven");
  await page.locator("[name=question]").fill("How many?");
  await page.locator("[name=picture]").setInputFiles(picture);
  await page.getByRole("button", { name: "Ask base and tuned" }).click();
  await page.locator(".answered[aria-busy=false] .said").waitFor();
  found.said_as_it_came = await page.locator(".said").innerText();
  await Promise.all([page.waitForNavigation(), page.locator("form.try").evaluate((form) => form.submit())]);  // as without JavaScript
  found.said_as_a_form = await page.locator(".said").innerText();
  found.answers = await page.locator(".said tr").evaluateAll((rows) => rows.map((row) => row.querySelector("th").textContent));

  await page.goto(url + "/questions?file=first/predictions-many.jsonl");
  found.open_ms = await page.evaluate(() => performance.getEntriesByType("navigation")[0].loadEventEnd);
  found.heap_bytes = await page.evaluate(() => performance.memory.usedJSHeapSize);
  return found;
}

async function violations(browser, url, colorScheme, width, paths) {
  const page = await browser.newPage({ viewport: { width, height: 900 }, colorScheme, bypassCSP: true });
  const found = [];
  for (const path of paths) {
    await page.goto(url + path);
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => window.axe.run());
    found.push(...violations.map((of) => `${path} ${of.id}: ${of.nodes.map((node) => node.html).join(", ")}`));
    const wider = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
    if (wider > 0) found.push(`${path} is ${wider} px too wide`);
  }
  return found;
}

(async () => {
  const [executablePath, url, settings, picture] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const found = await drive(browser, url, JSON.parse(settings), picture);
  found.violations = [
    ...await violations(browser, url, "light", 1100, ["/", "/questions?file=first/predictions-eval.jsonl"]),
    ...await violations(browser, url, "dark", 400, ["/runs/driven", "/new?lang=zh"]),
  ];
  console.log(JSON.stringify(found));
  await browser.close();
})();
