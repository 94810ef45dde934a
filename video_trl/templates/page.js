"use strict";

// What the voting and the marking page have in common. `busy`: an action waits for its answer.
const page = { busy: false };
const byId = (id) => document.getElementById(id);

async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(path, options);
  const content = await response.json();
  if (!response.ok) throw new Error(content.error);
  return content;
}

function show(section) {
  for (const each of document.querySelectorAll("main > section")) each.hidden = each.id !== section;
}

function complain(text) {
  byId("message").textContent = text;
  byId("message").hidden = text === "";
}

// Runs one action at a time; what goes wrong is said on the page, and the answers stay.
async function attempt(action, program, after) {
  if (page.busy) return;
  page.busy = true;
  complain("");
  try {
    await action();
  } catch (error) {
    complain(error instanceof TypeError ? `The ${program} program does not answer. Is it still running?` : error.message);
  } finally {
    page.busy = false;
    after();
  }
}
