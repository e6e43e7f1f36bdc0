// What the pages do besides links and forms: parts that change are fetched again, keys move between cards, and answers are shown as
// they are said.
const LIVE_MS = 2000, IDLE_MS = 10000;  // while a run is running, and where none is

async function refresh() {
  const parts = [...document.querySelectorAll("[data-live]")];
  const busy = parts.some((part) => part.contains(document.activeElement) && document.activeElement.matches("button, a"));
  if (!parts.length || document.hidden || busy || !location.protocol.startsWith("http")) return;
  const answer = await fetch(location.href, { headers: { accept: "text/html" } }).catch(() => null);
  document.documentElement.classList.toggle("lost", !answer?.ok);
  if (!answer?.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  for (const part of parts) {
    const other = fresh.querySelector(`[data-live="${part.dataset.live}"]`);
    if (!other) continue;
    const chosen = [...part.querySelectorAll("input:checked")].map((input) => input.value);
    if (part.tagName === "DETAILS") other.open = part.open || other.open;
    if (part.innerHTML === other.innerHTML) continue;
    part.replaceChildren(...other.childNodes);
    for (const input of part.querySelectorAll("input")) input.checked = chosen.includes(input.value);
  }
}

(async () => {
  for (;;) {
    const wait = document.querySelector(".state.running, .state.starting") ? LIVE_MS : IDLE_MS;
    await new Promise((done) => setTimeout(done, wait));
    await refresh();
  }
})();

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select")) return;
  const cards = [...document.querySelectorAll("article.card")];
  const step = { j: 1, k: -1 }[event.key];
  if (step && cards.length) {
    const at = cards.findIndex((card) => card.contains(document.activeElement));
    const next = cards[Math.min(cards.length - 1, Math.max(0, at + step))];
    next.focus();
    next.scrollIntoView({ block: "start" });
  }
  const search = document.querySelector("input[type=search]");
  if (event.key === "/" && search) { search.focus(); event.preventDefault(); }
});

for (const select of document.querySelectorAll("select[data-go]")) {
  select.addEventListener("change", () => select.form.requestSubmit());
}

const attempt = document.querySelector("form.try");

function answered(html) {
  const fresh = new DOMParser().parseFromString(html, "text/html").querySelector(".answered");
  if (fresh) document.querySelector(".answered").replaceChildren(...fresh.childNodes);
  return Boolean(fresh);
}

async function ask() {  // whether the page that ends it was shown
  const answer = await fetch(attempt.action, { method: "POST", body: new FormData(attempt), headers: { accept: "application/x-ndjson" } });
  if (!answer.headers.get("content-type").includes("ndjson")) return answered(await answer.text());
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", shown = false;;) {
    const { done, value } = await reader.read();
    if (done) return shown;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const { who, piece, page } of lines.map((line) => JSON.parse(line))) {
      if (page) shown = answered(page);
      else document.querySelector(`[data-who=${who}]`).append(piece);
    }
  }
}

attempt?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const [place, button] = [document.querySelector(".answered"), attempt.querySelector("button")];
  const card = document.querySelector("#asking").content.cloneNode(true);
  card.querySelector(".question").textContent = attempt.question.value;
  place.replaceChildren(card);
  place.ariaBusy = button.disabled = true;
  if (!await ask().catch(() => false)) attempt.submit();  // whatever it was, the server's page says it
  place.ariaBusy = button.disabled = false;
});
