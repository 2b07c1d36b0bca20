//! Tokens to a tree.
//!
//! ```text
//! program:    (function | statement)*
//! function:   "fn" NAME "(" [NAME ("," NAME)*] ")" block
//! block:      "{" statement* "}"
//! statement:  "let" NAME "=" expression ";" | NAME "=" expression ";" | "return" expression ";" | expression ";"
//!             | "while" expression block | "if" expression block ["else" block]
//! expression: sums, products and comparisons of numbers, names, calls and expressions in parentheses
//! ```

use crate::lexer::{Token, tokens};

pub(crate) enum Expression {
    Number(f64),
    Name(String),
    Call(String, Vec<Expression>),
    Binary(&'static str, Box<(Expression, Expression)>),
}

pub(crate) enum Statement {
    Let(String, Expression),
    Assign(String, Expression),
    Return(Expression),
    Expression(Expression),
    While(Expression, Vec<Statement>),
    If(Expression, Vec<Statement>, Vec<Statement>),
}

pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) params: Vec<String>,
    pub(crate) body: Vec<Statement>,
}

pub(crate) enum Item {
    Function(Function),
    Statement(Statement),
}

/// Operators that bind equally, from the weakest.
const PRECEDENCE: [&[&str]; 3] = [&["==", "!=", "<=", ">=", "<", ">"], &["+", "-"], &["*", "/", "%"]];

/// Expressions in parentheses, and blocks, in each other.
const MAX_DEPTH: usize = 200;

/// Reads a program.
pub(crate) fn parse(text: &str) -> Result<Vec<Item>, String> {
    let mut parser = Parser { tokens: tokens(text)?, at: 0, depth: 0 };
    let mut items = Vec::new();
    while parser.at < parser.tokens.len() {
        items.push(if parser.takes("fn") {
            Item::Function(parser.function()?)
        } else {
            Item::Statement(parser.statement()?)
        });
    }
    Ok(items)
}

struct Parser {
    tokens: Vec<(Token, usize)>,
    at: usize,
    depth: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|(token, _)| token)
    }

    /// Takes the next token if it is this one.
    fn takes(&mut self, fixed: &str) -> bool {
        let is_next = matches!(self.peek(), Some(Token::Fixed(next)) if *next == fixed);
        self.at += usize::from(is_next);
        is_next
    }

    fn expect(&mut self, fixed: &str) -> Result<(), String> {
        if self.takes(fixed) { Ok(()) } else { Err(self.wrong(&format!("{fixed:?}"))) }
    }

    fn wrong(&self, wanted: &str) -> String {
        match self.tokens.get(self.at) {
            Some((token, line)) => format!("line {line}: {wanted} wanted, not {token:?}"),
            None => format!("{wanted} wanted at the end"),
        }
    }

    fn name(&mut self) -> Result<String, String> {
        let Some(Token::Name(name)) = self.peek() else { return Err(self.wrong("a name")) };
        let name = name.clone();
        self.at += 1;
        Ok(name)
    }

    /// Reads elements up to a closing parenthesis.
    fn list<T>(&mut self, element: impl Fn(&mut Self) -> Result<T, String>) -> Result<Vec<T>, String> {
        let mut list = Vec::new();
        while !self.takes(")") {
            if !list.is_empty() {
                self.expect(",")?;
            }
            list.push(element(self)?);
        }
        Ok(list)
    }

    fn function(&mut self) -> Result<Function, String> {
        let name = self.name()?;
        self.expect("(")?;
        Ok(Function { name, params: self.list(Self::name)?, body: self.block()? })
    }

    fn block(&mut self) -> Result<Vec<Statement>, String> {
        self.expect("{")?;
        self.deeper()?;
        let mut statements = Vec::new();
        while !self.takes("}") {
            statements.push(self.statement()?);
        }
        self.depth -= 1;
        Ok(statements)
    }

    fn deeper(&mut self) -> Result<(), String> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(self.wrong("something less deep")) } else { Ok(()) }
    }

    fn statement(&mut self) -> Result<Statement, String> {
        if self.takes("while") {
            return Ok(Statement::While(self.expression(0)?, self.block()?));
        }
        if self.takes("if") {
            let (condition, then) = (self.expression(0)?, self.block()?);
            let otherwise = if self.takes("else") { self.block()? } else { Vec::new() };
            return Ok(Statement::If(condition, then, otherwise));
        }
        let statement = if self.takes("let") {
            let name = self.name()?;
            self.expect("=")?;
            Statement::Let(name, self.expression(0)?)
        } else if self.takes("return") {
            Statement::Return(self.expression(0)?)
        } else if let (Some(Token::Name(name)), Some((Token::Fixed("="), _))) =
            (self.peek().cloned(), self.tokens.get(self.at + 1))
        {
            self.at += 2;
            Statement::Assign(name, self.expression(0)?)
        } else {
            Statement::Expression(self.expression(0)?)
        };
        self.expect(";")?;
        Ok(statement)
    }

    fn expression(&mut self, level: usize) -> Result<Expression, String> {
        let Some(operators) = PRECEDENCE.get(level) else { return self.operand() };
        let mut left = self.expression(level + 1)?;
        while let Some(&operator) = operators.iter().find(|operator| self.takes(operator)) {
            let right = self.expression(level + 1)?;
            left = Expression::Binary(operator, Box::new((left, right)));
        }
        Ok(left)
    }

    fn operand(&mut self) -> Result<Expression, String> {
        self.deeper()?;
        let operand = match self.peek().cloned() {
            Some(Token::Number(number)) => {
                self.at += 1;
                Expression::Number(number)
            }
            Some(Token::Name(name)) => {
                self.at += 1;
                if self.takes("(") {
                    Expression::Call(name, self.list(|parser| parser.expression(0))?)
                } else {
                    Expression::Name(name)
                }
            }
            _ if self.takes("-") => Expression::Binary("-", Box::new((Expression::Number(0.0), self.operand()?))),
            _ if self.takes("(") => {
                let inner = self.expression(0)?;
                self.expect(")")?;
                inner
            }
            _ => return Err(self.wrong("an expression")),
        };
        self.depth -= 1;
        Ok(operand)
    }
}
