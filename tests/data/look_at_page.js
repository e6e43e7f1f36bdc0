// Opens a page of `show --html` in Chromium and prints what it finds as JSON: node look_at_page.js BROWSER URL
const { readFileSync } = require("fs");
const { createRequire } = require("module");
const here = createRequire(process.cwd() + "/");
const { chromium } = here("playwright-core");
const axe = readFileSync(here.resolve("axe-core/axe.min.js"), "utf8");

async function look(browser, url) {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 } });
  const found = { said: [], asked: [], alerts: 0, search: {}, kinds: {} };
  page.on("console", (message) => found.said.push(message.text()));
  page.on("pageerror", (error) => found.said.push(error.message));
  page.on("dialog", (dialog) => { found.alerts += 1; dialog.dismiss(); });
  page.on("request", (asked) => { if (asked.url() !== url && !asked.url().startsWith("data:")) found.asked.push(asked.url()); });
  await page.goto(url);
  found.cards = await page.locator(".card").count();
  found.pictures = await page.locator(".card img").evaluateAll((all) => Promise.all(all.map((image) =>
    image.decode().then(() => [image.naturalWidth, image.naturalHeight]))));
  found.texts = await page.locator(".card").evaluateAll((all) => all.map((card) =>
    [...card.querySelectorAll(".run")].map((run) => run.textContent).join("")));
  const shown = () => page.locator(".card:visible").evaluateAll((all) => all.map((card) => card.id));
  for (const words of ["zebra", "A'B.PNG", "no such word"]) {
    await page.locator("input[type=search]").fill(words);
    found.search[words] = await shown();
  }
  await page.locator("input[type=search]").fill("");
  for (const kind of ["problems", "media", "text", "all"]) {
    await page.locator(`input[value=${kind}]`).check();
    found.kinds[kind] = await shown();
  }
  const opacity = () => page.locator(".see").first().evaluate(async (see) => {
    await Promise.all(see.getAnimations({ subtree: true }).map((of) => of.finished));
    return getComputedStyle(see, "::after").opacity;
  });
  found.grid = [await opacity()];
  await page.locator(".see").first().hover();
  found.grid.push(await opacity());
  await page.locator(".see button").first().focus();
  await page.keyboard.press("Enter");
  const isOpen = () => page.locator("dialog").evaluate((dialog) => dialog.open);
  found.enlarged = [await isOpen()];
  await page.keyboard.press("Escape");
  found.enlarged.push(await isOpen());
  await page.locator("#tokens").check();
  await page.locator(".card").last().scrollIntoViewIfNeeded();
  await page.locator(".card").last().locator("i").first().waitFor();
  found.tokens = await page.locator(".card").last().locator("i").evaluateAll((all) => all.map((token) => token.textContent));
  return found;
}

async function violations(browser, url, colorScheme) {
  const page = await browser.newPage({ viewport: { width: 1100, height: 900 }, colorScheme, bypassCSP: true });
  await page.goto(url);
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run());
  return violations.map((of) => `${of.id}: ${of.nodes.map((node) => node.html).join(", ")}`);
}

(async () => {
  const [executablePath, url] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const found = await look(browser, url);
  found.violations = { light: await violations(browser, url, "light"), dark: await violations(browser, url, "dark") };
  console.log(JSON.stringify(found));
  await browser.close();
})().catch((error) => { console.error(error); process.exit(1); });
