"use strict";

// Who marks, what is asked, which pair is shown, and the marks so far.
const state = { rater: "", questions: [], task: null, answers: { left: {}, right: {} }, back: 0 };
const SIDES = ["left", "right"];
const act = (action) => attempt(action, "marking", () => {});

async function next(back) {
  const { task, done, total } = await ask(`/api/task?rater=${encodeURIComponent(state.rater)}&back=${back}`);
  Object.assign(state, { task, back, answers: { left: {}, right: {} } });
  byId("progress").max = total;
  byId("progress").value = done;
  byId("count").textContent = `${done} of ${total}`;
  byId("back").disabled = back >= done;
  if (task === null) {
    for (const side of SIDES) byId(side).removeAttribute("src");
    byId("summary").textContent = `All ${total} pairs have your marks, ${state.rater}.`;
    show("finished");
    return;
  }
  byId("prompt").textContent = task.prompt;
  for (const side of SIDES) byId(side).src = task[side];
  draw();
  show("marking");
}

// A row of five buttons for each question and each video.
function draw() {
  byId("questions").replaceChildren(...state.questions.map((question) => {
    const group = document.createElement("fieldset");
    const legend = document.createElement("legend");
    legend.textContent = question.text;
    group.append(legend, ...SIDES.map((side) => {
      const row = document.createElement("div");
      row.className = "answers";
      row.append(side === "left" ? "Left " : "Right ", ...[1, 2, 3, 4, 5].map((mark) => {
        const button = document.createElement("button");
        button.type = "button";
        button.dataset.side = side;
        button.dataset.question = question.key;
        button.dataset.mark = mark;
        button.textContent = mark;
        button.setAttribute("aria-pressed", String(state.answers[side][question.key] === mark));
        button.addEventListener("click", () => { state.answers[side][question.key] = mark; draw(); });
        return button;
      }));
      return row;
    }));
    return group;
  }));
  byId("save").disabled = !SIDES.every((side) => Object.keys(state.answers[side]).length === state.questions.length);
}

byId("start").addEventListener("submit", (event) => {
  event.preventDefault();
  state.rater = byId("name").value.trim();
  act(async () => {
    state.questions = (await ask("/api/study")).questions;
    await next(0);
  });
});
byId("save").addEventListener("click", () => act(async () => {
  await ask("/api/vote", { rater: state.rater, task: state.task.task, answers: state.answers });
  await next(0);
}));
byId("back").addEventListener("click", () => act(() => next(state.back + 1)));
byId("replay").addEventListener("click", () => {
  for (const side of SIDES) { byId(side).currentTime = 0; byId(side).play().catch(() => {}); }
});
for (const side of SIDES) byId(side).addEventListener("canplay", () => byId(side).play().catch(() => {}));
show("welcome");
