//! The tree to running code: each function becomes one of Cranelift's, and each statement outside of functions a function
//! that is called and removed.

use crate::parser::{Expression, Function, Item, Statement, parse};
use cranelift_codegen::Context;
use cranelift_codegen::ir::condcodes::FloatCC;
use cranelift_codegen::ir::{AbiParam, InstBuilder, Signature, Value, types};
use cranelift_frontend::{FunctionBuilder, FunctionBuilderContext, Variable};
use cranelift_module::{FuncId, Linkage, Module, ModuleError, default_libcall_names};
use farlink::Session;
use farlink_cranelift::{FarlinkBuilder, FarlinkModule};
use std::collections::HashMap;

/// A program that grows.
pub(crate) struct Program {
    module: FarlinkModule,
    builder_context: FunctionBuilderContext,
}

/// Says everything that an error of the module's has to say.
fn describe(error: ModuleError) -> String {
    match error {
        ModuleError::Backend(error) => format!("{error}"),
        other => other.to_string(),
    }
}

impl Program {
    /// Begins an empty program in `session`, in which `print` does what `print` does.
    pub(crate) fn new(session: &Session, print: impl Fn(f64) + Send + Sync + 'static) -> Result<Self, String> {
        let builder = FarlinkBuilder::new(session, default_libcall_names()).map_err(describe)?.hotswap(true);
        let print = move |number: f64| {
            print(number);
            number
        };
        let library = builder.library();
        library.add_shared_library("libm.so.6").map_err(|error| error.to_string())?;
        library.define_callback("print", print).map_err(|error| error.to_string())?;
        Ok(Self { module: FarlinkModule::new(builder), builder_context: FunctionBuilderContext::new() })
    }

    /// Adds the functions of a text and runs its statements; gives the value of the last one that is an expression.
    pub(crate) fn run(&mut self, text: &str) -> Result<Option<f64>, String> {
        let mut last = None;
        for item in parse(text)? {
            match item {
                Item::Function(function) => {
                    let signature = self.signature(function.params.len());
                    let id = self.module.declare_function(&function.name, Linkage::Export, &signature);
                    self.define(id.map_err(describe)?, &function)?;
                }
                Item::Statement(statement) => {
                    let is_expression = matches!(statement, Statement::Expression(_));
                    let value = self.run_statement(statement)?;
                    last = if is_expression { Some(value) } else { last };
                }
            }
        }
        Ok(last)
    }

    fn run_statement(&mut self, statement: Statement) -> Result<f64, String> {
        let body = vec![match statement {
            Statement::Expression(expression) => Statement::Return(expression),
            other => other,
        }];
        let id = self.module.declare_anonymous_function(&self.signature(0)).map_err(describe)?;
        self.define(id, &Function { name: "a statement".to_owned(), params: Vec::new(), body })?;
        let result = self.call(id);
        self.module.remove_function(id).map_err(describe)?;
        result
    }

    fn call(&mut self, id: FuncId) -> Result<f64, String> {
        self.module.finalize_definitions().map_err(describe)?;
        let function = self.module.function::<fn() -> f64>(id).map_err(describe)?;
        // SAFETY: the function has been compiled with this signature.
        unsafe { function.call(()) }.map_err(|error| error.to_string())
    }

    fn signature(&self, params: usize) -> Signature {
        let mut signature = self.module.make_signature();
        signature.params = vec![AbiParam::new(types::F64); params];
        signature.returns = vec![AbiParam::new(types::F64)];
        signature
    }

    fn define(&mut self, id: FuncId, function: &Function) -> Result<(), String> {
        let mut context = Context::new();
        context.func.signature = self.signature(function.params.len());
        let mut builder = FunctionBuilder::new(&mut context.func, &mut self.builder_context);
        let block = builder.create_block();
        builder.append_block_params_for_function_params(block);
        builder.switch_to_block(block);
        let params = builder.block_params(block).to_vec();
        let mut translator = Translator { module: &mut self.module, builder, variables: HashMap::new() };
        for (name, value) in function.params.iter().zip(params) {
            translator.declare(name, value);
        }
        let translated = translator.block(&function.body);
        let zero = translator.builder.ins().f64const(0.0);
        translator.builder.ins().return_(&[zero]);
        translator.builder.seal_all_blocks();
        translator.builder.finalize(translator.module.target_config());
        translated.map_err(|text| format!("{}: {text}", function.name))?;
        // A definition takes the place of the one before, if there is one.
        let _ = self.module.prepare_for_function_redefine(id);
        self.module.define_function(id, &mut context).map_err(describe)
    }
}

/// Translates the body of a function.
struct Translator<'a> {
    module: &'a mut FarlinkModule,
    builder: FunctionBuilder<'a>,
    variables: HashMap<String, Variable>,
}

impl Translator<'_> {
    fn declare(&mut self, name: &str, value: Value) {
        let variable = self.builder.declare_var(types::F64);
        self.builder.def_var(variable, value);
        self.variables.insert(name.to_owned(), variable);
    }

    fn variable(&self, name: &str) -> Result<Variable, String> {
        self.variables.get(name).copied().ok_or_else(|| format!("{name} is no variable"))
    }

    fn block(&mut self, statements: &[Statement]) -> Result<(), String> {
        let outer = self.variables.clone();
        let result = statements.iter().try_for_each(|statement| self.statement(statement));
        self.variables = outer;
        result
    }

    fn statement(&mut self, statement: &Statement) -> Result<(), String> {
        match statement {
            Statement::Let(name, expression) => {
                let value = self.expression(expression)?;
                self.declare(name, value);
            }
            Statement::Assign(name, expression) => {
                let (value, variable) = (self.expression(expression)?, self.variable(name)?);
                self.builder.def_var(variable, value);
            }
            Statement::Return(expression) => {
                let value = self.expression(expression)?;
                self.builder.ins().return_(&[value]);
                // What follows is not reached, but has to be somewhere.
                let rest = self.builder.create_block();
                self.builder.switch_to_block(rest);
            }
            Statement::Expression(expression) => drop(self.expression(expression)?),
            Statement::While(condition, body) => {
                let [head, inside, after] = [(); 3].map(|()| self.builder.create_block());
                self.builder.ins().jump(head, &[]);
                self.builder.switch_to_block(head);
                let condition = self.condition(condition)?;
                self.builder.ins().brif(condition, inside, &[], after, &[]);
                self.builder.switch_to_block(inside);
                self.block(body)?;
                self.builder.ins().jump(head, &[]);
                self.builder.switch_to_block(after);
            }
            Statement::If(condition, then, otherwise) => {
                let [yes, no, after] = [(); 3].map(|()| self.builder.create_block());
                let condition = self.condition(condition)?;
                self.builder.ins().brif(condition, yes, &[], no, &[]);
                for (block, statements) in [(yes, then), (no, otherwise)] {
                    self.builder.switch_to_block(block);
                    self.block(statements)?;
                    self.builder.ins().jump(after, &[]);
                }
                self.builder.switch_to_block(after);
            }
        }
        Ok(())
    }

    /// Everything but 0 is true.
    fn condition(&mut self, expression: &Expression) -> Result<Value, String> {
        let value = self.expression(expression)?;
        let zero = self.builder.ins().f64const(0.0);
        Ok(self.builder.ins().fcmp(FloatCC::NotEqual, value, zero))
    }

    fn expression(&mut self, expression: &Expression) -> Result<Value, String> {
        match expression {
            Expression::Number(number) => Ok(self.builder.ins().f64const(*number)),
            Expression::Name(name) => {
                let variable = self.variable(name)?;
                Ok(self.builder.use_var(variable))
            }
            Expression::Call(name, args) => {
                let args = args.iter().map(|arg| self.expression(arg)).collect::<Result<Vec<_>, _>>()?;
                self.call(name, &args)
            }
            Expression::Binary(operator, operands) => {
                let (left, right) = (self.expression(&operands.0)?, self.expression(&operands.1)?);
                self.binary(operator, left, right)
            }
        }
    }

    /// Calls a function of the program's, or of a library's if it has none of that name.
    fn call(&mut self, name: &str, args: &[Value]) -> Result<Value, String> {
        let mut signature = self.module.make_signature();
        signature.params = vec![AbiParam::new(types::F64); args.len()];
        signature.returns = vec![AbiParam::new(types::F64)];
        let id = self.module.declare_function(name, Linkage::Import, &signature).map_err(describe)?;
        let function = self.module.declare_func_in_func(id, self.builder.func);
        let call = self.builder.ins().call(function, args);
        Ok(self.builder.inst_results(call)[0])
    }

    fn binary(&mut self, operator: &str, left: Value, right: Value) -> Result<Value, String> {
        let comparison = match operator {
            "+" => return Ok(self.builder.ins().fadd(left, right)),
            "-" => return Ok(self.builder.ins().fsub(left, right)),
            "*" => return Ok(self.builder.ins().fmul(left, right)),
            "/" => return Ok(self.builder.ins().fdiv(left, right)),
            "%" => return self.call("fmod", &[left, right]),
            "==" => FloatCC::Equal,
            "!=" => FloatCC::NotEqual,
            "<" => FloatCC::LessThan,
            "<=" => FloatCC::LessThanOrEqual,
            ">" => FloatCC::GreaterThan,
            _ => FloatCC::GreaterThanOrEqual,
        };
        let is_true = self.builder.ins().fcmp(comparison, left, right);
        Ok(self.builder.ins().fcvt_from_uint(types::F64, is_true))
    }
}
