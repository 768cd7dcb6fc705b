"use strict";
// Starts `ideoflow captions lsp` and connects VS Code to it; everything else is in the server.
const vscode = require("vscode");
const { LanguageClient } = require("vscode-languageclient/node");

let client;

exports.activate = async () => {
  const command = vscode.workspace.getConfiguration("ideoflow").get("command");
  client = new LanguageClient(
    "ideoflow-captions",
    "Ideoflow captions",
    { command, args: ["captions", "lsp", "--stdio"] },
    { documentSelector: [{ scheme: "file", language: "icap" }] },
  );
  try {
    await client.start();
  } catch (error) {
    vscode.window.showErrorMessage(
      `ideoflow could not be started (${error.message}). pip install 'ideoflow[editor]', then set ideoflow.command.`,
    );
  }
};

exports.deactivate = () => client?.stop();
