// Search and filters, the borders of tokens, and a picture's enlargement. Pictures stand in the page once each.
"use strict";
const pictures = JSON.parse(document.getElementById("pictures").textContent);
for (const image of document.querySelectorAll("img[data-src]")) image.src = pictures[image.dataset.src];

const cards = [...document.querySelectorAll(".card")];
const texts = new Map();
const search = document.querySelector("input[type=search]");
const told = document.querySelector("output");
const none = document.querySelector(".none");
const kinds = {
  all: () => true,
  problems: (card) => card.classList.contains("bad"),
  media: (card) => card.classList.contains("seen"),
  text: (card) => card.classList.contains("text"),
};

function textOf(card) {
  if (!texts.has(card)) texts.set(card, card.textContent.toLowerCase());
  return texts.get(card);
}

function choose() {
  const is = kinds[document.querySelector("input[name=kind]:checked").value];
  const words = search.value.toLowerCase().trim();
  let count = 0;
  for (const card of cards) {
    card.hidden = !(is(card) && (!words || textOf(card).includes(words)));
    count += !card.hidden;
  }
  const all = `${cards.length} record${cards.length === 1 ? "" : "s"}`;
  told.textContent = count === cards.length ? all : `${count} of ${all}`;
  none.hidden = count > 0;
}

search.addEventListener("input", choose);
for (const input of document.querySelectorAll("input[name=kind]")) input.addEventListener("change", choose);
choose();

// A run of tokens becomes one element a token when somebody looks at it: a page of them all would be slow.
function split(run) {
  if (!run.dataset.ends) return;
  const said = run.textContent;
  let at = 0;
  run.replaceChildren(...run.dataset.ends.split(" ").map((end) => {
    const [length, count] = end.split("*").map(Number);
    const token = document.createElement("i");
    token.textContent = said.slice(at, at += length);
    if (count) token.title = `${count} tokens`;
    return token;
  }));
  delete run.dataset.ends;
}

const splitAll = (element) => element.querySelectorAll(".run").forEach(split);
const near = new IntersectionObserver((seen) => {
  for (const entry of seen) if (entry.isIntersecting) splitAll(entry.target);
}, { rootMargin: "400px" });
const tokens = document.getElementById("tokens");
tokens.addEventListener("change", () => {
  document.body.classList.toggle("tokens", tokens.checked);
  cards.forEach((card) => tokens.checked ? near.observe(card) : near.unobserve(card));
});
const grid = document.getElementById("grid");
grid.addEventListener("change", () => document.body.classList.toggle("grid", grid.checked));

const dialog = document.querySelector("dialog");
document.addEventListener("mouseover", (event) => {
  const turn = event.target.closest?.(".turn");
  if (turn) splitAll(turn);
});
document.addEventListener("click", (event) => {
  const see = event.target.closest(".turn .see:not(.broken)");
  if (see) {
    const figure = see.closest("figure");
    const large = dialog.querySelector("figure");
    const plain = see.cloneNode(true);
    plain.querySelector("button").remove();
    const caption = document.createElement("figcaption");
    const at = see.parentElement.querySelector(".at");
    caption.textContent = figure.querySelector("figcaption").textContent + (at ? ` · ${at.textContent}` : "");
    large.style.cssText = figure.style.cssText;
    large.replaceChildren(plain, caption);
    dialog.showModal();
  } else if (event.target === dialog) dialog.close();
});
