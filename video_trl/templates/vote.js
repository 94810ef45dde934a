"use strict";

// State of the page: who votes, what is asked, which pair is shown, and the answers so far.
const state = { rater: "", questions: [], task: null, answers: {}, back: 0, shown: 0, ready: false };
const KEYS = { ArrowLeft: "left", 1: "left", ArrowDown: "same", 2: "same", ArrowRight: "right", 3: "right" };
const LABELS = { left: "Left is better", same: "Same", right: "Right is better" };
const videos = () => [byId("left"), byId("right")];

const act = (action) => attempt(action, "voting", drawAnswers);

async function begin() {
  if (state.questions.length === 0) state.questions = (await ask("/api/study")).questions;
  drawQuestions();
  await next(0);
}

// Shows the next pair without a vote, or the one that was voted on `back` votes ago.
async function next(back) {
  const { task, done, total } = await ask(`/api/task?rater=${encodeURIComponent(state.rater)}&back=${back}`);
  byId("progress").max = total;
  byId("progress").value = done;
  byId("count").textContent = `${done} of ${total}`;
  byId("back").disabled = back >= done;
  state.back = back;
  state.task = task;
  state.answers = {};
  state.ready = false;
  if (task === null) {
    for (const video of videos()) video.removeAttribute("src");
    byId("summary").textContent = `All ${total} pairs have your vote, ${state.rater}.`;
    show("finished");
    return;
  }
  byId("prompt").textContent = task.prompt;
  byId("left").src = task.left;
  byId("right").src = task.right;
  show("voting");
  document.activeElement.blur();  // or Space would press the button of the last answer
}

function replay() {
  for (const video of videos()) { video.currentTime = 0; video.play().catch(() => {}); }
}

// A pair can be voted on once both videos can be seen; then they start together.
function loaded() {
  if (state.ready || !videos().every((video) => video.readyState >= 3)) return;
  state.ready = true;
  state.shown = performance.now();
  replay();
  drawAnswers();
}

function goBack() {
  act(() => next(state.back + 1));
}

function drawQuestions() {
  byId("questions").replaceChildren(...state.questions.map((question) => {
    const group = document.createElement("fieldset");
    group.dataset.question = question.key;
    const legend = document.createElement("legend");
    legend.textContent = question.text;
    const row = document.createElement("div");
    row.className = "answers";
    for (const side of question.ties ? ["left", "same", "right"] : ["left", "right"]) {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.side = side;
      button.textContent = LABELS[side];
      button.addEventListener("click", () => answer(question, side));
      row.append(button);
    }
    group.append(legend, row);
    return group;
  }));
}

function drawAnswers() {
  const active = open();
  for (const group of byId("questions").children) {
    const key = group.dataset.question;
    group.classList.toggle("active", state.ready && active !== undefined && active.key === key);
    for (const button of group.querySelectorAll("button")) {
      button.setAttribute("aria-pressed", String(state.answers[key] === button.dataset.side));
      button.disabled = !state.ready;
    }
  }
}

function open() {
  return state.questions.find((question) => !(question.key in state.answers));
}

function answer(question, side) {
  if (!state.ready || page.busy || (side === "same" && !question.ties)) return;
  state.answers[question.key] = side;
  drawAnswers();
  if (open() === undefined) act(submit);
}

async function submit() {
  const seconds = (performance.now() - state.shown) / 1000;
  const vote = { rater: state.rater, task: state.task.task, answers: state.answers, seconds };
  try {
    await ask("/api/vote", vote);
  } catch (error) {
    state.answers = {};
    throw error;
  }
  await next(0);
}

byId("start").addEventListener("submit", (event) => {
  event.preventDefault();
  state.rater = byId("name").value.trim();
  act(async () => {
    await begin();
    localStorage.setItem("rater", state.rater);
  });
});
byId("other").addEventListener("click", () => {
  localStorage.removeItem("rater");
  byId("name").value = "";
  show("welcome");
  byId("name").focus();
});
byId("back").addEventListener("click", goBack);
byId("last").addEventListener("click", goBack);
byId("replay").addEventListener("click", replay);
for (const video of videos()) {
  video.addEventListener("canplay", loaded);
  video.addEventListener("error", () => {
    if (video.hasAttribute("src")) complain("A video cannot be played. Tell the person who runs the study; this pair cannot be voted on.");
  });
}
document.addEventListener("keydown", (event) => {
  if (byId("voting").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === " ") {
    if (document.activeElement instanceof HTMLButtonElement) return;  // space presses the button that has the focus
    event.preventDefault();
    replay();
  } else if (event.key === "Backspace") {
    event.preventDefault();
    if (!byId("back").disabled) goBack();
  } else if (event.key in KEYS && open() !== undefined) {
    event.preventDefault();
    answer(open(), KEYS[event.key]);
  }
});

state.rater = localStorage.getItem("rater") ?? "";
byId("name").value = state.rater;
if (state.rater === "") show("welcome");
else act(begin);
